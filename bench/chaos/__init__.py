"""The chaos run: it kills the parts of a pipeline under load, and keeps a ledger of every request."""
