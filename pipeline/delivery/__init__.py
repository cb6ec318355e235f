"""Everything one does with a request in hand: pull, hold, write its record, move it, end it."""
