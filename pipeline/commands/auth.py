"""`headrace auth`: the account of a tenant, for the configuration of a nats-server with `nats/accounts.conf`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from pipeline.commands import say, tell
from pipeline.config import ConfigError
from pipeline.wire.subjects import is_tenant
from pipeline.wire.usage import DEFAULT_TENANT

# The users of `nats/accounts.conf`, and the tenant of plain subjects in accounts of use and pauses.
_RESERVED = frozenset({"pipeline", "engine", "client", DEFAULT_TENANT})

_SERVICES = (
    "llm.request.*.t.{tenant}",
    "llm.request.*.t.{tenant}.*",
    "llm.ask.*.t.{tenant}",
    "llm.cancel.t.{tenant}.*",
    "llm.queue.position.t.{tenant}",
    "llm.queue.usage.t.{tenant}",
    "llm.queue.answer.t.{tenant}",
    "llm.queue.stats",
    "llm.models",
    "$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.t.{tenant}.*",
)
_STREAMS = (("HEADRACE", "llm.reply.t.{tenant}.>"), ("HEADRACE", "llm.load.*"))
_INBOXES = (("HEADRACE", "_INBOX.t.{tenant}.>"), ("ENGINES", "_INBOX.t.{tenant}.>"))


def account(tenant: str, password: str) -> str:
    """The account and the user of a tenant, in nats-server's configuration language.

    The account imports the tenant's own subjects and nothing else: what is not imported does not exist in it, and a
    reply to whatever its user sends goes to a subject in it.
    """
    services = [f'      {{ service: {{ account: HEADRACE, subject: "{one}" }} }}' for one in _SERVICES]
    streams = [f'      {{ stream: {{ account: {of}, subject: "{one}" }} }}' for of, one in (*_STREAMS, *_INBOXES)]
    imports = "\n".join(services + streams).replace("{tenant}", tenant)
    return (
        f"  TENANT_{tenant}: {{\n"
        f'    users: [{{ user: "{tenant}", password: "{password}" }}]\n'
        f"    imports: [\n{imports}\n    ]\n"
        f"  }}\n"
    )


def auth(tenant: str, file: Path | None) -> int:
    """Make a tenant's account, and append it to the file. Without a file, print it.

    Args:
        tenant: its name, which is also the name of its user.
        file: the file that `accounts.conf` includes. It is created if it does not exist.

    Returns:
        1 if the file already has the tenant, else 0.

    Raises:
        ConfigError: the name is not valid, or the file cannot be read or written.
    """
    if not is_tenant(tenant) or tenant in _RESERVED:
        raise ConfigError(
            f'"{tenant}" is not a valid tenant. Use 1 to 64 letters, digits, "-" or "_", except pipeline, engine, '
            "client and default."
        )
    password = secrets.token_urlsafe(24)
    block = account(tenant, password)
    if file is None:
        say(block, end="")
        tell("headrace: Add this account to tenants.conf beside accounts.conf, and reload nats-server.")
        return 0
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if re.search(rf"^ *TENANT_{re.escape(tenant)}:", text, re.MULTILINE):
            tell(f'headrace: {file} already has the tenant "{tenant}". Remove its account first to make a new one.')
            return 1
        _replace(file, f"{text}{block}")
    except OSError as error:
        raise ConfigError(f"Cannot write {file}: {error.strerror}.") from None
    say(f"user {tenant}\npassword {password}")
    tell(f"headrace: Added the account to {file}. Apply it with `nats-server --signal reload`.")
    return 0


def _replace(file: Path, text: str) -> None:
    """Replace the file in one step. Its owner alone can read it: it contains passwords."""
    draft = file.with_name(f"{file.name}.part")
    try:
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as written:  # noqa: PTH123
            written.write(text)
        draft.replace(file)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
