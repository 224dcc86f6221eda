"""Sources of teachers: the hub, a folder, a GGUF file, an installed package; and checks of what they hold."""
