"""Who calls, and what they may: API keys, priorities, the ids of their requests. No I/O.

Keys are kept as `sha256:<salt>:<hex digest of salt and key>`: they are random and long, so one round of a fast hash is
as good as many of a slow one. `headrace key add NAME` makes one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from pipeline.config import HttpKey
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import Priority, is_generated_id, is_request_id

_ORDER = {Priority.LOW: 0, Priority.MEDIUM: 1, Priority.HIGH: 2}
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


class Caller(NamedTuple):
    """Who calls.

    Attributes:
        name: by which limits are kept: the key's name, or the address.
        tenant: for whom, or empty.
        key: the API key's entry, None where keys are not in use.
    """

    name: str
    tenant: str = ""
    key: HttpKey | None = None

    @property
    def sees_all(self) -> bool:
        """Whether everybody's requests are shown to it: without keys, and to an operator."""
        return self.key is None or self.key.operator

    def may_see(self, tenant: str) -> bool:
        """Whether what belongs to a tenant is shown to it; what belongs to nobody is the operators'."""
        return self.sees_all or tenant == self.tenant


def hashed(key: str, salt: str) -> str:
    """A key as it is kept."""
    return f"sha256:{salt}:{hashlib.sha256(f'{salt}{key}'.encode()).hexdigest()}"


def make_key(name: str) -> tuple[str, HttpKey]:
    """A new random key and the entry that knows it again."""
    key = f"hr-{secrets.token_urlsafe(32)}"
    return key, HttpKey(name=name, hash=hashed(key, secrets.token_hex(8)))


def _is_hash_of(entry: HttpKey, key: str) -> bool:
    salt = entry.hash.split(":")[1]
    return hmac.compare_digest(entry.hash, hashed(key, salt))


def identify(keys: Sequence[HttpKey], headers: Mapping[str, str], address: str) -> Caller:
    """Who calls.

    Args:
        keys: those that may; without any, everybody may.
        headers: of the request, names in lower case.
        address: where it comes from.

    Raises:
        HttpError: 401.
    """
    if not keys:
        return Caller(address)
    scheme, _, given = headers.get("authorization", "").partition(" ")
    key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not key:
        raise HttpError(401, ErrorCode.UNAUTHORIZED, "an API key is needed: send it as `Authorization: Bearer KEY`")
    # All are looked at, so that the time taken says nothing of which one it is.
    known = [entry for entry in keys if _is_hash_of(entry, key)]
    if not known:
        raise HttpError(401, ErrorCode.UNAUTHORIZED, "this API key is not known here")
    return Caller(known[0].name, known[0].tenant or known[0].name, known[0])


def priority_of(caller: Caller, wanted: str | None, default: Priority) -> Priority:
    """The priority of a call: what it asks for, else its key's, else the default.

    Raises:
        HttpError: 400 for a priority that there is not, 403 for one above what the key may.
    """
    if wanted is None:
        return min(caller.key.priority, caller.key.highest, key=_ORDER.__getitem__) if caller.key else default
    try:
        priority = Priority(wanted.strip().lower())
    except ValueError:
        raise HttpError(
            400, ErrorCode.INVALID_REQUEST, "X-Priority is high, medium or low", param="X-Priority"
        ) from None
    if caller.key and _ORDER[priority] > _ORDER[caller.key.highest]:
        raise HttpError(
            403,
            ErrorCode.UNAUTHORIZED,
            f"this API key may ask with priority {caller.key.highest} at most",
            param="X-Priority",
        )
    return priority


def own_id(caller: Caller, given: str) -> str:
    """The request id behind one that a caller gives. Each key has its own: nobody meets another one's by chance."""
    if caller.key is None or given.startswith(f"{caller.key.name}-"):
        return given
    return f"{caller.key.name}-{given}"


def meant_id(caller: Caller, given: str) -> str:
    """The request id behind one by which a caller asks for a request that there is; an operator gives it whole."""
    return given if caller.sees_all else own_id(caller, given)


def request_id(caller: Caller, headers: Mapping[str, str]) -> tuple[str, bool]:
    """The id of a new request, and whether the caller gave it; one that no request may have is not taken."""
    for name in ("idempotency-key", "x-request-id"):
        given = headers.get(name, "")
        chosen = own_id(caller, given)
        if given and is_request_id(chosen) and not is_generated_id(chosen):
            return chosen, True
    return own_id(caller, secrets.token_hex(12)), False


def is_loopback(host: str) -> bool:
    """Whether a host to bind to is this machine's alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(256)
def is_local_name(netloc: str) -> bool:
    """Whether a `Host` or the host of an `Origin` names this machine as itself.

    An open gateway answers to no other name: a page from elsewhere could otherwise have its own name resolve to
    loopback, and a visitor's browser talk to the models in its name.
    """
    host = _host_of(netloc)
    return is_loopback(host) or host.endswith(_LOCAL_SUFFIXES)


def is_page_of_this_machine(origin: str) -> bool:
    """Whether an `Origin` is certain to be served by this machine: `.local` and `.internal` may be a neighbour."""
    host = _host_of(origin.partition("://")[2])
    return is_loopback(host) or host.endswith(".localhost")


def _host_of(netloc: str) -> str:
    host = netloc.rpartition("@")[2].lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host
