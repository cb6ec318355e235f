"""One thin shell per role: MLX, Ollama, routing, monitor, and the stand-in for an absent Ollama."""
