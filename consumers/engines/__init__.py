"""The engines behind `pipeline.engine`: one in a child process, and Ollama."""
