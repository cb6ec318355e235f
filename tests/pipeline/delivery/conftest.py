"""Whole workers and a client serve the tests of deliveries as they serve those of the worker."""

from tests.pipeline.worker.conftest import client, start

__all__ = ["client", "start"]
