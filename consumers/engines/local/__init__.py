"""An engine in its own supervised child process: the only package that imports MLX."""
