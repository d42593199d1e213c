"""Torch to ONNX: the five graphs of an ILF model, their precision, and the reference they are checked by."""
