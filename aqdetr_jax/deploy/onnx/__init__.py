"""Deployed networks as ONNX graphs, for ONNX Runtime on CPUs (extra ``onnx``)."""
