"""How many requests are served before one of a tenant's, if the tenants of its lane take turns."""

from __future__ import annotations

from collections.abc import Mapping


def requests_before(position: int, tenant: str, queued: Mapping[str, int]) -> int:
    """Estimate how many requests of a priority are begun before one of a tenant.

    Each other tenant begins as many as the tenant itself has before that request. This takes all requests to be of the
    same length.

    Args:
        position: how many requests of the priority were stored before it.
        tenant: its own; empty for the default tenant.
        queued: how many requests of the priority each tenant has, that request included, as last counted.
    """
    others = [count for name, count in queued.items() if name != tenant and count > 0]
    if not others:
        return position
    own = min(position, max(0, queued.get(tenant, 0) - 1))
    return own + sum(min(count, own) for count in others)
