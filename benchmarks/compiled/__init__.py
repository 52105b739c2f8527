"""Engines of TensorRT-RTX built on the CPU: how far from eager the file is, how long building takes, how large the engine is."""
