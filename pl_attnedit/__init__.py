"""Give a trained Hugging Face language model a cheaper attention, and recover its quality by distillation."""
