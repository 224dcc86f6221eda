"""Attention kernels for the cases in which PyTorch's own function is not the best choice."""
