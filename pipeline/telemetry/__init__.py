"""Tracing of requests: one connected trace for each, through every process that has a hand in it.

    publish llm.request.high                 PRODUCER   who asks (or a foreign publisher's own span)
      process llm.request.high               CONSUMER   the worker, or the routing consumer
        queue wait                                      from being stored to being delivered
        chat <model>                         INTERNAL   the engine (CLIENT where it is a server: Ollama)
        embeddings <model>                   CLIENT     or that, where texts are to be embedded
        triage                               INTERNAL   where it shall go, and why
          publish llm.ollama.high            PRODUCER
            process llm.ollama.high          CONSUMER   ... and so on
        publish llm.reply                    PRODUCER   the last message

The context travels in the headers `traceparent` and `tracestate` (W3C Trace Context). Spans are sent over
OTLP (HTTP, protobuf) when an endpoint is set in the environment; without one nothing is recorded, nothing is
imported and no thread is started. Neither prompts nor answers are recorded.
"""

from __future__ import annotations

from pipeline.telemetry.tracing import ChatSpan, EmbeddingsSpan, ProcessSpan, Span, Tracing, TriageSpan

__all__ = ["ChatSpan", "EmbeddingsSpan", "ProcessSpan", "Span", "Tracing", "TriageSpan"]
