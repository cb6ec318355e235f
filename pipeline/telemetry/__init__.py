"""Tracing of requests. Each request has one connected trace through all processes that handle it.

    publish llm.request.high                 PRODUCER   the client (or a foreign publisher's own span)
      queue wait                             INTERNAL   from storing to delivery
      process llm.request.high               CONSUMER   the worker, or the routing consumer
        chat <model>                         INTERNAL   the engine (CLIENT where it is a server: Ollama)
        embeddings <model>                   CLIENT     instead of chat, for an embeddings request
        triage                               INTERNAL   which engine may have it, and why
        publish llm.ollama.high              PRODUCER
          process llm.ollama.high            CONSUMER   ... and so on
        publish llm.reply                    PRODUCER   the last message
      withdraw llm.request.high              CLIENT     the monitor: the request ends in its queue
      attempt lost                           INTERNAL   the monitor: a worker did not end its attempt

The first span of a request whose publisher began no trace is `request`, INTERNAL: from storing to the end.

The headers `traceparent` and `tracestate` carry the context (W3C Trace Context). Spans are sent over OTLP (HTTP,
protobuf) if the environment sets an endpoint. Without an endpoint, nothing is recorded, the SDK is not imported and no
thread starts. Prompts and answers are never recorded.
"""

from __future__ import annotations

from pipeline.telemetry.spans import ChatSpan, EmbeddingsSpan, ProcessSpan, Span, TriageSpan
from pipeline.telemetry.tracing import Tracing

__all__ = ["ChatSpan", "EmbeddingsSpan", "ProcessSpan", "Span", "Tracing", "TriageSpan"]
