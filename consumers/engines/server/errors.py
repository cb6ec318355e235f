"""What goes wrong in a call to a model server. No I/O."""

from __future__ import annotations


class ServerError(Exception):
    """A call that failed.

    Args:
        message: the server's error, or what happened to the connection.
        status: the HTTP status; None if the connection or the answer broke.
        away: whether the server was not reached, or asks for a later retry: it has done nothing with the call.
        code: the server's own code or type of the error; empty if it gives none.
        param: the parameter that the server blames; None if it names none.
    """

    def __init__(
        self, message: str, status: int | None = None, *, away: bool = False, code: str = "", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.away = away
        self.code = code
        self.param = param


class BadAnswer(ValueError):
    """An answer that does not have the shape of the server's API. The message is a sentence."""
