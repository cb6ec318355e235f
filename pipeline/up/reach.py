"""Who answers on the network: quick questions to a NATS server, an Ollama, a collector. Nobody there is no error."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import msgspec

OLLAMA_PORT = 11434
NATS_PORT = 4222
_LOOK_EVERY_S = 0.2


def ollama_url(host: str) -> str:
    """Ollama's base URL from what `OLLAMA_HOST` may hold: nothing, a host, `host:port`, or a URL.

    The address that a server listens on everywhere (`0.0.0.0`) is this machine's to a client.
    """
    text = host.strip().rstrip("/")
    parts = urlsplit(text if "://" in text else f"http://{text}")
    name = parts.hostname or "127.0.0.1"
    if name in ("0.0.0.0", "::"):  # noqa: S104 - recognized, not bound to
        name = "127.0.0.1"
    name = f"[{name}]" if ":" in name else name
    default = {"http": 80, "https": 443}[parts.scheme] if "://" in text else OLLAMA_PORT
    return f"{parts.scheme}://{name}:{parts.port or default}{parts.path}"


async def jetstream_answers(url: str, *, timeout_s: float = 1.0) -> bool:
    """Whether a NATS server with JetStream is at url, by the greeting that the server sends to whoever connects."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or NATS_PORT)
            greeting = await reader.readline()
        return greeting.startswith(b"INFO ") and bool(msgspec.json.decode(greeting[5:]).get("jetstream"))
    except (OSError, ValueError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


async def any_broker_answers(urls: str) -> bool:
    """Whether a server with JetStream is at one of several URLs, separated by commas."""
    return any(await asyncio.gather(*map(jetstream_answers, urls.split(","))))


async def broker_answers_within(urls: str, patience_s: float) -> bool:
    """Whether a server with JetStream answers at one of several URLs before patience_s is over."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    while not await any_broker_answers(urls):
        if loop.time() >= give_up_at:
            return False
        await asyncio.sleep(_LOOK_EVERY_S)
    return True


async def ollama_version(url: str, *, timeout_s: float = 2.0) -> str | None:
    """The version of the Ollama at url (a stand-in says that it is one), or None where none answers."""
    answer = await _get_json(f"{url}/api/version", timeout_s=timeout_s)
    return str(answer["version"]) if answer is not None and "version" in answer else None


async def ollama_models(url: str, *, timeout_s: float = 5.0) -> list[str]:
    """The names of the models of the Ollama at url; none where it does not answer."""
    answer = await _get_json(f"{url}/api/tags", timeout_s=timeout_s) or {}
    return [str(model["name"]) for model in answer.get("models") or [] if "name" in model]


async def port_answers(url: str, *, timeout_s: float = 1.0) -> bool:
    """Whether anything accepts connections at the host and port of url."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
            )
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return True


async def _get_json(url: str, *, timeout_s: float) -> dict[str, Any] | None:
    import httpx  # noqa: PLC0415 - slow to import, and the client that the package `ollama` brings

    try:
        async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
            answer = (await client.get(url)).raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return answer if isinstance(answer, dict) else None
