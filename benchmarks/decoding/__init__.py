"""Decoding side by side: time to the first token, tokens per second and memory of Calque's artifacts and of two peers'."""
