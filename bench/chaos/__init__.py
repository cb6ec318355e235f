"""The chaos run: kills the parts of a pipeline under load, and checks the outcome of every request in a ledger."""
