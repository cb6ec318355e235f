"""The engine's own process: model, batch and caches, fed over a pipe."""
