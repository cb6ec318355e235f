"""A model server as an engine, whatever its API: the engine, its answers, and what all calls over HTTP share."""
