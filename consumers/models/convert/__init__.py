"""From a GGUF file to a folder in MLX's format, in a process of its own: `python -m consumers.models.convert`."""
