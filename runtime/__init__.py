"""Loads artifacts where they run; ONNX ones with numpy and onnxruntime alone."""

from calque.runtime.decoder import Decoder
from calque.runtime.onnxruntime_session import OnnxRuntimeSession
from calque.runtime.session import load, open_session

__all__ = ["Decoder", "OnnxRuntimeSession", "load", "open_session"]
