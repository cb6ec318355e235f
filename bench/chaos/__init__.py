"""The chaos run: a pipeline whose parts are killed under load, and a ledger that says what became of every request."""
