"""Training speed and memory of this engine beside PyTorch's, see README.md."""
