"""Where a teacher comes from: the hub, a folder, a GGUF file, an installed package; and what is no teacher."""
