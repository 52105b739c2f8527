"""Conversion side by side: seconds, processor time, memory and bytes of Calque and of two peers, on one checkpoint."""
