"""The header that charges a request to an API key. Only the pipeline can make it.

The gateway knows the key of a request, and a worker or a monitor charges it. Only headers travel with the request, and
a publisher on NATS writes its own. So the header contains a code, made with the pipeline's secret from the request's
name, its tenant and the key. It cannot be forged, and is not valid on another request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from pipeline.wire.usage import DEFAULT_TENANT

_CODE_BYTES = 15


def charged(secret: bytes, name: str, tenant: str, key: str) -> str:
    """The header that charges a request to a key.

    Args:
        secret: of the pipeline, as in `MoveIds`.
        name: the request's.
        tenant: of the key.
        key: its name, without a colon.
    """
    return f"{key}:{_code(secret, name, tenant, key)}"


def charged_key(secret: bytes, name: str, tenant: str, header: str) -> str:
    """The key that a header charges; empty for a header that the pipeline did not make for this request."""
    key, _, code = header.partition(":")
    if not secret or not key or not code.isascii() or not hmac.compare_digest(code, _code(secret, name, tenant, key)):
        return ""
    return key


def charged_tenant(owner: str, claimed: str, key: str) -> str:
    """The tenant that a request is charged to.

    Args:
        owner: the tenant that its subject names; empty for the default tenant.
        claimed: what `Llm-Tenant` says.
        key: the key that it is charged to. Then the gateway has written the header.

    Returns:
        The owner, or the tenant of the key. Anyone who may publish for the default tenant can claim any other one, so a
        claim without a key is a part of the default tenant: `default/<claimed>`.
    """
    if owner:
        return owner
    if key and claimed:
        return claimed
    return f"{DEFAULT_TENANT}/{claimed}" if claimed else DEFAULT_TENANT


def _code(secret: bytes, name: str, tenant: str, key: str) -> str:
    said = f"{name}\n{tenant}\n{key}".encode(errors="replace")
    digest = hashlib.blake2b(said, key=secret, digest_size=_CODE_BYTES, person=b"headrace charge").digest()
    return base64.urlsafe_b64encode(digest).decode()
