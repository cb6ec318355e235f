"""How each family of models writes tool calls, as grammars for calls that are forced or strict."""
