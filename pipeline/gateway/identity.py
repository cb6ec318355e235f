"""Callers and their permissions: API keys, priorities, the ids of their requests. No I/O.

Keys are stored as `sha256:<salt>:<hex digest of salt and key>`. They are random and long, so one round of a fast hash
is as safe as many rounds of a slow one. `headrace key add NAME` makes one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from pipeline.config import Config, ConfigError, HttpKey
from pipeline.gateway.statuses import HttpError
from pipeline.machine import is_loopback
from pipeline.wire.errors import ErrorCode, quoted
from pipeline.wire.subjects import Priority, is_generated_id, is_request_id, is_tenant, request_name, split_name

# Of an id that is too long for the ids of further choices: more than the name of a key.
_KEPT_CHARS = 80
_ORDER = {Priority.LOW: 0, Priority.MEDIUM: 1, Priority.HIGH: 2}


_NO_OWNERS: Mapping[str, str] = {}


class Caller(NamedTuple):
    """The caller of an HTTP request.

    Attributes:
        name: the key's name, or the address; rate limits count by it.
        tenant: of its requests; empty without keys.
        key: the API key's entry; None if no keys are in use.
        owners: of an operator, the tenants on whose lanes the requests of all keys are, by the names of the keys.
    """

    name: str
    tenant: str = ""
    key: HttpKey | None = None
    owners: Mapping[str, str] = _NO_OWNERS

    @property
    def owner(self) -> str:
        """The tenant on whose lanes its requests are stored; empty for the default tenant."""
        return "" if self.key is None else _owner_of(self.key)

    @property
    def sees_all(self) -> bool:
        """Whether it sees the requests of all tenants: without keys, and as an operator."""
        return self.key is None or self.key.operator

    def may_see(self, tenant: str) -> bool:
        """Whether it sees what belongs to a tenant. Only operators see what has no tenant."""
        return self.sees_all or tenant == self.tenant


def _owner_of(key: HttpKey) -> str:
    """The tenant of a key; empty for the default one, to which keys without a tenant belong.

    So do keys whose tenant cannot stand in a subject: a tenant can have a dot.
    """
    return key.tenant if is_tenant(key.tenant) else ""


def hashed(key: str, salt: str) -> str:
    """A key as it is stored."""
    return f"sha256:{salt}:{hashlib.sha256(f'{salt}{key}'.encode()).hexdigest()}"


def make_key(name: str) -> tuple[str, HttpKey]:
    """A new random key, and its entry in the settings."""
    key = f"hr-{secrets.token_urlsafe(32)}"
    return key, HttpKey(name=name, hash=hashed(key, secrets.token_hex(8)))


def _is_hash_of(entry: HttpKey, key: str) -> bool:
    salt = entry.hash.split(":")[1]
    return hmac.compare_digest(entry.hash, hashed(key, salt))


def identify(keys: Sequence[HttpKey], headers: Mapping[str, str], address: str, *, locked: bool = False) -> Caller:
    """The caller of a request.

    Args:
        keys: the known API keys. Without any, every caller is accepted.
        headers: of the request, names in lower case.
        address: of the client.
        locked: a key is required, also if there is none.

    Raises:
        HttpError: 401.
    """
    if not keys and not locked:
        return Caller(address)
    scheme, _, given = headers.get("authorization", "").partition(" ")
    key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not key:
        raise HttpError(401, ErrorCode.UNAUTHORIZED, "An API key is required. Send it as `Authorization: Bearer KEY`.")
    # Every key is compared, so that the time does not reveal which one matches.
    known = [entry for entry in keys if _is_hash_of(entry, key)]
    if not known:
        raise HttpError(401, ErrorCode.UNAUTHORIZED, "Unknown API key.")
    caller = Caller(known[0].name, known[0].tenant or known[0].name, known[0])
    return caller._replace(owners={key.name: _owner_of(key) for key in keys}) if caller.sees_all else caller


def priority_of(caller: Caller, wanted: str | None, default: Priority) -> Priority:
    """The priority of a call: the requested one, else its key's, else the default.

    Raises:
        HttpError: 400 for an unknown priority, 403 for a priority above the key's highest.
    """
    if wanted is None:
        return min(caller.key.priority, caller.key.highest, key=_ORDER.__getitem__) if caller.key else default
    try:
        priority = Priority(wanted.strip().lower())
    except ValueError:
        message = f"X-Priority must be high, medium or low, not {quoted(wanted, 40)}."
        raise HttpError(400, ErrorCode.INVALID_REQUEST, message, param="X-Priority") from None
    if caller.key and _ORDER[priority] > _ORDER[caller.key.highest]:
        raise HttpError(
            403,
            ErrorCode.UNAUTHORIZED,
            f"The highest priority of this API key is {caller.key.highest}. Lower X-Priority.",
            param="X-Priority",
        )
    return priority


def own_id(caller: Caller, given: str) -> str:
    """The request id for an id that a caller chose. It begins with the key's name, so two keys never share an id."""
    if caller.key is None or given.startswith(f"{caller.key.name}-"):
        return given
    return f"{caller.key.name}-{given}"


def own_name(caller: Caller, given: str) -> str:
    """The name of the request for an id that a caller chose."""
    return request_name(caller.owner, own_id(caller, given))


def meant_name(caller: Caller, given: str) -> str:
    """The name of the request that a caller looks up by its id or its name; empty for one of another tenant.

    An operator gives ids in full: they begin with the name of a key.
    """
    tenant, given_id = split_name(given)
    if caller.sees_all:
        return given if tenant else request_name(caller.owners.get(given.partition("-")[0], ""), given)
    return own_name(caller, given_id) if tenant in ("", caller.owner) else ""


def request_id(caller: Caller, headers: Mapping[str, str]) -> tuple[str, bool]:
    """The id of a new request, and whether the caller chose it. A key that cannot be an id stands for one.

    `X-Request-Id` is none: a proxy or an agent gives one to all the calls of one inbound request.
    """
    given = headers.get("idempotency-key", "")
    if not given:
        return own_id(caller, secrets.token_hex(12)), False
    chosen = own_id(caller, given)
    return chosen if _can_be_id(chosen) else own_id(caller, f"key-{_digest(given)}"), True


def choice_id(first: str, number: int) -> str:
    """The id of a further choice of a call, after the id of its first. It begins like that one, with the key's name."""
    chosen = f"{first}-{number}"
    return chosen if _can_be_id(chosen) else f"{first[:_KEPT_CHARS]}-{_digest(first)}-{number}"


def _can_be_id(chosen: str) -> bool:
    return is_request_id(chosen) and not is_generated_id(chosen)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sender_of(address: str) -> str:
    """Whose address this is, for limits: a client with IPv6 has a whole network of 64 bits."""
    try:
        sender = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(sender, ipaddress.IPv4Address) or is_loopback(address):
        return address
    if sender.ipv4_mapped is not None:
        return str(sender.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(sender), 64), strict=False))


def check_exposure(config: Config) -> None:
    """Check that no other machine can call without a key.

    Raises:
        ConfigError: HTTP is bound to more than loopback, and there is no key.
    """
    if not config.http_keys and not is_loopback(config.http_host):
        raise ConfigError(
            f"Without `http_keys`, HTTP at {config.http_host} would be open to every machine that reaches this one. "
            "Add a key (`headrace key add NAME`), or leave `http_host` at 127.0.0.1."
        )


@lru_cache(256)
def is_local_name(netloc: str) -> bool:
    """Whether a `Host`, or the host of an `Origin`, is a local name of this machine.

    A gateway without keys serves no other name. Otherwise a foreign page could let its own name resolve to loopback,
    and call the models from a visitor's browser (DNS rebinding). Other machines can have names in `.local` and
    `.internal`.
    """
    host = _host_of(netloc)
    return is_loopback(host) or host.endswith(".localhost")


class Admitted(NamedTuple):
    """Who is served by a gateway without keys, beside this machine's own names and pages.

    Attributes:
        names: further host names, in lower case.
        origins: further origins; one that ends with `://` stands for all of its scheme.
    """

    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], origins: Sequence[str]) -> Admitted:
        """As the settings `http_names` and `http_origins` have them."""
        return cls(frozenset(map(str.lower, names)), frozenset(map(str.lower, origins)))

    def host(self, netloc: str) -> bool:
        """Whether a `Host` is served."""
        return is_local_name(netloc) or _host_of(netloc) in self.names

    def origin(self, origin: str) -> bool:
        """Whether pages with this `Origin` can call."""
        scheme, separator, netloc = origin.lower().partition("://")
        if not self.origins.isdisjoint({origin.lower(), scheme + separator}):
            return True
        return self.host(netloc)


def _host_of(netloc: str) -> str:
    host = netloc.rpartition("@")[2].lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host
