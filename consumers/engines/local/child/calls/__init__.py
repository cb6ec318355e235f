"""Tool calls: how each family of models writes them, read while they are written."""
