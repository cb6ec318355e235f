"""The parser of HTTP/1 requests. It ignores offers to change the protocol, as RFC 9110, section 7.8, permits.

httptools ends a request that has an `Upgrade` header at its head, and takes its body for the other protocol. Java's
`HttpClient` offers h2c in the first request of a connection. Such a head is parsed again without the offer.
"""

from __future__ import annotations

from typing import Protocol

import httptools

_OFFER = frozenset({b"upgrade", b"http2-settings"})


class Head(Protocol):
    """The connection: what httptools' callbacks have told it of the request that is being parsed."""

    url: bytes
    headers: list[tuple[bytes, bytes]]


class HttpParser:
    """httptools' parser for one connection.

    The connection ignores `on_headers_complete` and `on_message_complete` while `offers` is true.

    Args:
        connection: gets httptools' callbacks.
    """

    def __init__(self, connection: Head) -> None:
        self._connection = connection
        self._parser = self._begin()

    @property
    def offers(self) -> bool:
        """Whether the request that is being parsed offers another protocol."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:
        """Parse data; raises as httptools does, and for an offer only at CONNECT."""
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if not self.offers:
                    raise
                data = self._head_without_offer() + data[offer.args[0] :]
                # If the request also closes the connection, the parser that read the offer ignores all that follows.
                self._parser = self._begin()
            else:
                return

    def get_method(self) -> bytes:
        """The method of the request that is being parsed."""
        return self._parser.get_method()

    def get_http_version(self) -> str:
        """The version of HTTP, as `1.1`."""
        return self._parser.get_http_version()

    def should_keep_alive(self) -> bool:
        """Whether the connection stays open after the response."""
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        """Whether the request asks for another protocol."""
        return bool(self._parser.should_upgrade())

    def _begin(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self._connection)
        # As uvicorn sets it: data behind a request that closes the connection is no error.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _head_without_offer(self) -> bytes:
        line = b"%s %s HTTP/%s\r\n" % (self.get_method(), self._connection.url, self.get_http_version().encode())
        kept = [b"%s: %s\r\n" % header for header in self._connection.headers if header[0] not in _OFFER]
        return line + b"".join(kept) + b"\r\n"
