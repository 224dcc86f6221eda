"""How attention is computed where PyTorch's own function is not the best way."""
