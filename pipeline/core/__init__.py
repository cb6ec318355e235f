"""Pure decisions: facts in, decisions out. No I/O, no clock, no randomness; time is an argument."""
