"""Builds TensorRT and TensorRT-RTX engines from ONNX in a separate process, and reports what they contain."""
