"""One fit, in plain PyTorch."""
