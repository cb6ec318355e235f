"""Models on disk: where each one is, how it gets there, and how a GGUF file becomes a folder in MLX's format."""
