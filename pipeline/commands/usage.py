"""`headrace usage`: requests and tokens of each tenant and key, as tables or JSON."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say_json
from pipeline.config import ConfigError
from pipeline.process.terminal import visible
from pipeline.wire.subjects import TENANT_ADVICE, is_tenant, usage_subject
from pipeline.wire.usage import Period, UsagePeriod, UsageReport, UsageSums

if TYPE_CHECKING:
    from rich.console import RenderableType

_LEAST_CHARS = 120
# How requests end that were not answered.
_ENDS = ("failed", "cancelled", "expired")
_TOKENS = ("prompt", "cached", "completion", "reasoning", "spilled")


def usage(url: str, *, tenant: str, as_json: bool) -> int:
    """Print the accounts of use of one tenant, or of all if it is empty. Return the exit code.

    Raises:
        ConfigError: the tenant's name is not valid.
    """
    if tenant and not is_tenant(tenant):
        raise ConfigError(f'--tenant: "{tenant}" is not a valid tenant. {TENANT_ADVICE}')
    return run_client(partial(_show, tenant=tenant, as_json=as_json), url, name="headrace usage")


async def _show(bus: Bus, *, tenant: str, as_json: bool) -> int:
    said = (await bus.request(usage_subject(tenant))).data
    if as_json:
        say_json(said)
        return 0
    from rich.console import Console  # noqa: PLC0415 - not needed for JSON

    console = Console(highlight=False, markup=False)
    # A row stays on one line, which a narrow terminal wraps itself.
    console.width = max(console.width, _LEAST_CHARS)
    console.print(render(msgspec.json.decode(said, type=UsageReport)))
    return 0


def render(report: UsageReport) -> RenderableType:
    """A table for each period: its tenants, their keys, and all together."""
    from rich.console import Group  # noqa: PLC0415 - as above

    periods = ((Period.HOUR, report.hour), (Period.DAY, report.day), (Period.MONTH, report.month))
    return Group(*(part for period, sums in periods for part in (*_table(period, sums), "")))


def _table(period: Period, sums: UsagePeriod) -> tuple[RenderableType, ...]:
    from rich.table import Table  # noqa: PLC0415 - as above

    since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(sums.start))
    title = f"This {period}, since {since} UTC"
    if not sums.tenants:
        return (f"{title}: no requests.",)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tenant", "key"):
        table.add_column(column, overflow="fold")
    for column in ("requests", *_ENDS, *_TOKENS):
        table.add_column(column, justify="right")
    for tenant in sums.tenants:
        table.add_row(visible(tenant.tenant, keep=""), "", *_cells(tenant))
        for key in sums.keys:
            if key.tenant == tenant.tenant:
                table.add_row("", visible(key.key, keep=""), *_cells(key))
    if len(sums.tenants) > 1:
        table.add_row("all", "", *_cells(sums.total))
    return f"{title}. Columns from `prompt` on are tokens.", table


def _cells(sums: UsageSums) -> list[str]:
    counts = [sums.requests.total, *(getattr(sums.requests, name) for name in _ENDS)]
    return [f"{count:,}" for count in (*counts, *(getattr(sums.tokens, name) for name in _TOKENS))]
