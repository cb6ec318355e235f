"""The engine's child process, with the model, the batch and the caches. The only package that imports MLX."""
