"""ONNX to TensorRT engines; only compiles."""
