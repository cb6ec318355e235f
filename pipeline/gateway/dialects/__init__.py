"""Translations between a client's API and requests and answers. No I/O."""
