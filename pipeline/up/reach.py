"""Whether a NATS server, an Ollama server or a collector of traces answers. No answer is a result, not an error."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pipeline import machine
from pipeline.broker.connection import without_password
from pipeline.config import ConfigError
from pipeline.machine import has_gpu

OLLAMA_PORT = 11434
NATS_PORT = 4222
_LOOK_EVERY_S = 0.2
_ANSWER_TIMEOUT_S = 5.0
_NATS_SCHEMES = ("nats", "tls", "ws", "wss")


def ollama_url(host: str) -> str:
    """Return the base URL of the Ollama server that `OLLAMA_HOST` names: nothing, a host, `host:port` or a URL.

    A server that listens on all addresses (`0.0.0.0`) is reached at `127.0.0.1`.

    Raises:
        ConfigError: it is none of these.
    """
    text = host.strip().rstrip("/")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        default = {"http": 80, "https": 443}[parts.scheme] if "://" in text else OLLAMA_PORT
        port = parts.port or default
    except (ValueError, KeyError):
        raise ConfigError(
            f'"{without_password(host)}" is not the address of an Ollama server, such as 127.0.0.1:11434. Correct '
            "--ollama-host or OLLAMA_HOST."
        ) from None
    name = parts.hostname or "127.0.0.1"
    if name in ("0.0.0.0", "::"):  # noqa: S104 - recognized, not bound to
        name = "127.0.0.1"
    name = f"[{name}]" if ":" in name else name
    return f"{parts.scheme}://{name}:{port}{parts.path}"


async def jetstream_answers(url: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> bool:
    """Return whether a NATS server with JetStream answers at url."""
    greeting = await _greeting(url, timeout_s)
    return greeting is not None and bool(greeting.get("jetstream"))


async def broker_trouble(urls: str, *, patience_s: float = 0.0) -> str | None:
    """Return why no broker can be used at the URLs, as a sentence, or None if one can.

    Args:
        urls: one URL, or several separated by commas. One server with JetStream is enough.
        patience_s: how long to wait for one.

    Raises:
        ConfigError: one of them is not the URL of a NATS server.
    """
    check_nats_urls(urls)
    give_up_at = asyncio.get_running_loop().time() + patience_s
    while (trouble := await _trouble(urls)) and asyncio.get_running_loop().time() < give_up_at:  # noqa: ASYNC110 - a server does not tell
        await asyncio.sleep(_LOOK_EVERY_S)
    return trouble


async def _trouble(urls: str) -> str | None:
    greetings = await asyncio.gather(*(_greeting(url, _ANSWER_TIMEOUT_S) for url in urls.split(",")))
    servers = [greeting for greeting in greetings if greeting is not None]
    if any(server.get("jetstream") for server in servers):
        return None
    if servers:
        return f"The NATS server at {without_password(urls)} runs without JetStream. Start it with -js."
    return f"No NATS server at {without_password(urls)}."


def check_nats_urls(urls: str) -> None:
    """Check the URLs of a broker, separated by commas.

    Raises:
        ConfigError: one of them is not the URL of a NATS server.
    """
    for url in urls.split(","):
        try:
            parts = urlsplit(_with_scheme(url))
            is_url = parts.scheme in _NATS_SCHEMES and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise ConfigError(
                f'"{without_password(url)}" is not the URL of a NATS server, such as nats://127.0.0.1:4222. Correct '
                "--nats-url."
            )


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"nats://{url}"


async def _greeting(url: str, timeout_s: float) -> dict[str, Any] | None:
    """What a NATS server at url sends to each new connection, or None if there is no NATS server."""
    writer = None
    try:
        parts = urlsplit(_with_scheme(url))
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or NATS_PORT)
            line = await reader.readline()
        return msgspec.json.decode(line[5:], type=dict[str, Any]) if line.startswith(b"INFO ") else None
    except (OSError, ValueError, TimeoutError):
        return None
    finally:
        if writer is not None:
            writer.close()


async def ollama_version(url: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> str | None:
    """Return the version of the Ollama server at url, or None if none answers. The stand-in names itself in it."""
    answer = await _get_json(f"{url}/api/version", timeout_s=timeout_s)
    return str(answer["version"]) if answer is not None and "version" in answer else None


async def ollama_answers(url: str) -> bool:
    """Return whether an Ollama server answers at url. Its port is tried first, which costs less than a call."""
    return await port_answers(url) and await ollama_version(url) is not None


async def ollama_models(url: str, *, timeout_s: float = 5.0) -> list[str]:
    """Return the names of the models of the Ollama server at url; an empty list if it does not answer."""
    answer = await _get_json(f"{url}/api/tags", timeout_s=timeout_s) or {}
    return [str(model["name"]) for model in answer.get("models") or [] if "name" in model]


async def openai_models(url: str, key: str = "", *, timeout_s: float = 5.0) -> list[str] | None:
    """Return the names of the models of the server of OpenAI's API at url; None if it does not list them."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await _get_json(f"{url}/v1/models", timeout_s=timeout_s, headers=headers)
    if answer is None or not isinstance(models := answer.get("data") or [], list):
        return None
    return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]


def shares_cpu(url: str) -> bool:
    """Return whether a server at url probably runs models on this machine's CPU."""
    return is_loopback(url) and not has_gpu()


async def ollama_shares_cpu(url: str) -> bool:
    """Return whether the Ollama server at url runs models on this machine's CPU.

    A server on this machine does if none of its loaded models is on a GPU. While no model is loaded, it does if this
    machine has no GPU.
    """
    if not is_loopback(url):
        return False
    answer = await _get_json(f"{url}/api/ps", timeout_s=_ANSWER_TIMEOUT_S) or {}
    loaded = [model for model in answer.get("models") or [] if isinstance(model, dict)]
    if loaded:
        return not any(model.get("size_vram") for model in loaded)
    return not has_gpu()


def is_loopback(url: str) -> bool:
    """Return whether url names this machine's own loopback address."""
    return machine.is_loopback(urlsplit(url).hostname or "")


async def key_trouble(url: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> str:
    """Return what the gateway at url says of a settings file that it could not read again; empty for nothing."""
    answer = await _get_json(f"{url}/readyz", timeout_s=timeout_s, any_status=True) or {}
    return str(answer.get("keys", ""))


async def port_answers(url: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> bool:
    """Return whether anything accepts connections at the host and port of url."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
            )
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return True


async def _get_json(
    url: str, *, timeout_s: float, headers: dict[str, str] | None = None, any_status: bool = False
) -> dict[str, Any] | None:
    import httpx  # noqa: PLC0415 - slow to import; a dependency of `ollama`

    try:
        # Certificates take longer to load than a server on this machine takes to answer.
        async with httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=url.startswith("https")) as client:
            response = await client.get(url, headers=headers)
            answer = (response if any_status else response.raise_for_status()).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return answer if isinstance(answer, dict) else None
