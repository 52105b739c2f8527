"""Loads artifacts where they run; ONNX ones with numpy and onnxruntime alone."""

from calque.runtime.onnxruntime_session import OnnxRuntimeSession
from calque.runtime.session import load, open_session

__all__ = ["OnnxRuntimeSession", "load", "open_session"]
