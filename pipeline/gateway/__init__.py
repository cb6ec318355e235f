"""The gateway: core request-reply, and HTTP with three APIs, for programs that do not use JetStream.

Nothing is imported here: `headrace up` asks `identity` one question, and must not load the server for it.
"""
