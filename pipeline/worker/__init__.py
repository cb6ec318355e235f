"""The shell that every engine's consumer shares: pull, generate, answer, acknowledge."""
