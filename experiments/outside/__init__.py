"""Our steps and forward pass beside PyTorch's and ONNX Runtime's, on one CPU, in one run."""
