"""ONNX to TensorRT and TensorRT-RTX: engines, built in a process of their own, and what is in them."""
