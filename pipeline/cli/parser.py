"""The parser of the command line. It stores the function of each command as `command`."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from pipeline import __version__
from pipeline.cli import commands
from pipeline.commands.options import CLIENT_KEYS, add_options
from pipeline.config import ConfigError

Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"  # noqa: SLF001 - it has no public name

_USAGE = "%(prog)s [OPTION ...]"
_PRIORITIES = ("high", "medium", "low")


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line, as those of settings are."""

    def error(self, message: str) -> NoReturn:
        """End the process with code 2."""
        self.exit(2, f"headrace: {message.removeprefix('argument ')}. Run `{self.prog} --help`.\n")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a command, by default those of the process. An invalid one ends the process.

    Raises:
        ConfigError: an option or an argument is unknown.
    """
    whole_parser, given = build_parser(), sys.argv[1:] if argv is None else argv
    if not given:
        whole_parser.exit(2, whole_parser.format_help())
    args, unknown = whole_parser.parse_known_args(given)
    if not unknown:
        return args
    parser: Parser = args.parser
    name = unknown[0].partition("=")[0]
    if not name.startswith("-"):
        raise ConfigError(f'Unexpected argument "{name}". Run `{parser.prog} --help`.')
    known = re.findall(r"--[a-z-]+", parser.format_help())
    close = difflib.get_close_matches(name, known, 1)
    advice = f"Did you mean {close[0]}?" if close else f"Run `{parser.prog} --help`."
    raise ConfigError(f"Unknown option {name}. {advice}")


def whole(text: str) -> int:
    """Convert a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number') from None


def number(text: str) -> float:
    """Convert a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number') from None


def build_parser() -> Parser:
    """Return the parser of all commands. It stores the function of the command as `command`."""
    parser = Parser(
        prog="headrace", description="A priority queue in front of local language models, on NATS JetStream."
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_servers(subparsers)
    _add_clients(subparsers)
    return parser


def _command(subparsers: Subparsers, name: str, purpose: str, usage: str | None = None) -> Parser:
    """Return the parser of a command, whose help begins with its purpose."""
    description = f"{purpose[0].upper()}{purpose[1:]}."
    parser = subparsers.add_parser(name, help=purpose, description=description, usage=usage)
    parser.set_defaults(parser=parser)
    return parser


def _asks(parser: Parser, command: Callable[[argparse.Namespace], int], **defaults: object) -> None:
    """Have a parser end in a command that asks a running pipeline."""
    parser.set_defaults(command=command, **defaults)
    add_options(parser, keys=CLIENT_KEYS)


def _add_servers(subparsers: Subparsers) -> None:
    up = _command(subparsers, "up", "run everything on this machine, including the broker", usage=_USAGE)
    up.add_argument("--ready-file", metavar="PATH", help="write a file when everything is ready; remove it at the end")
    add_options(up)
    up.set_defaults(command=commands.do_up)

    role = _command(subparsers, "run", "run one role against a broker", usage="%(prog)s ROLE [OPTION ...]")
    role.add_argument("role", metavar="ROLE", choices=commands.ROLE_MODULES, help=", ".join(commands.ROLE_MODULES))
    role.add_argument("--url", dest="openai", action="append", metavar="URL", help="the server of `run openai`")
    add_options(role)
    role.set_defaults(command=commands.do_run)

    demo = _command(subparsers, "demo", "start a separate pipeline, overload it and show what happens", usage=_USAGE)
    demo.add_argument(
        "--seconds", type=number, default=30.0, metavar="SECONDS", help="how long to send requests (default: 30)"
    )
    add_options(demo)
    demo.set_defaults(command=commands.do_demo)


def _add_clients(subparsers: Subparsers) -> None:
    send = _command(subparsers, "send", "send a prompt and print the answer")
    send.add_argument("text", metavar="TEXT", help="the prompt; - reads it from standard input")
    send.add_argument("--priority", choices=_PRIORITIES, default="medium", help="default: medium")
    send.add_argument("--model", help="the model that must answer; any model by default")
    send.add_argument(
        "--task", choices=("simple", "complex"), help="whether a smaller model can answer; headrace decides by default"
    )
    send.add_argument("--max-tokens", type=whole, metavar="N", help="maximum length of the answer, in tokens")
    send.add_argument("--timeout", type=number, metavar="SECONDS", help="give up if there is no answer within SECONDS")
    send.add_argument("--no-stream", dest="stream", action="store_false", help="print the answer when it is complete")
    send.add_argument("-v", "--verbose", action="store_true", help="print progress (queue, engine, timing) to stderr")
    _asks(send, commands.do_send)
    _add_watchers(subparsers)
    cancel = _command(subparsers, "cancel", "cancel a request")
    cancel.add_argument("id", metavar="ID", help="id of the request")
    _asks(cancel, commands.do_cancel)
    _add_operator(subparsers)
    _add_batch(subparsers)
    _add_dead(subparsers)
    _add_key(subparsers)
    _add_auth(subparsers)
    _add_models(subparsers)

    doctor = _command(subparsers, "doctor", "check what headrace needs and suggest fixes", usage=_USAGE)
    add_options(doctor)
    doctor.set_defaults(command=commands.do_doctor)


def _add_watchers(subparsers: Subparsers) -> None:
    stats = _command(subparsers, "stats", "show the statistics of the queue")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--watch", action="store_true", help="update every second until interrupted")
    _asks(stats, commands.do_stats)
    usage = _command(subparsers, "usage", "show the requests and tokens of each tenant and API key")
    usage.add_argument("--tenant", default="", metavar="NAME", help="only this tenant, which its own user can ask for")
    usage.add_argument("--json", action="store_true", help="print JSON")
    _asks(usage, commands.do_usage)
    top = _command(subparsers, "top", "show the statistics, updated every second; the same as `stats --watch`")
    _asks(top, commands.do_stats, json=False, watch=True)
    bench = _command(subparsers, "bench", "measure how fast the running pipeline answers")
    bench.add_argument("--requests", type=whole, default=8, metavar="N", help="how many to send (default: 8)")
    bench.add_argument("--priority", choices=_PRIORITIES, default="medium", help="default: medium")
    bench.add_argument("--model", help="the model that must answer; any model by default")
    bench.add_argument("--max-tokens", type=whole, default=64, metavar="N", help="length of each answer (default: 64)")
    _asks(bench, commands.do_bench)


def _add_operator(subparsers: Subparsers) -> None:
    for name, text in (
        ("pause", "keep the queued requests of a lane or a tenant from beginning"),
        ("resume", "end a pause"),
    ):
        scope = _command(subparsers, name, text)
        scope.add_argument("lane", metavar="LANE", nargs="?", choices=_PRIORITIES, help="high, medium or low")
        scope.add_argument("--tenant", metavar="NAME", help="of this tenant only; `default` is the default tenant")
        scope.add_argument("--reason", default="", metavar="TEXT", help="kept with the pause, and shown")
        _asks(scope, commands.do_pause, action=name)
    paused = _command(subparsers, "paused", "list what is paused, by whom and why")
    paused.add_argument("--json", action="store_true", help="print JSON")
    paused.add_argument("--log", action="store_true", help="list the latest pauses and resumes instead")
    _asks(paused, commands.do_paused)
    move = _command(subparsers, "move", "change the priority of queued requests")
    move.add_argument("id", metavar="ID", nargs="?", help="id of one request; for that of a tenant, t.TENANT.ID")
    move.add_argument("priority", metavar="PRIORITY", choices=_PRIORITIES, help="high, medium or low")
    move.add_argument("--batch", metavar="ID", help="all queued lines of a batch")
    move.add_argument("--tenant", metavar="NAME", help="all queued requests of a tenant")
    move.add_argument("--reason", default="", metavar="TEXT", help="written to the log")
    _asks(move, commands.do_move)


def _add_batch(subparsers: Subparsers) -> None:
    batch = _command(subparsers, "batch", "run the lines of a file at LOW and write the results beside it")
    batch.add_argument("source", metavar="FILE", help="a JSONL file as for OpenAI's Batch API, or the id of a batch")
    batch.add_argument(
        "--endpoint", metavar="PATH", help="the endpoint of every line (default: that of the first line)"
    )
    batch.add_argument(
        "--window", default="24h", metavar="TIME", help="time in which the batch must end, such as 30m or 24h"
    )
    _asks(batch, commands.do_batch)


def _add_dead(subparsers: Subparsers) -> None:
    dead = _command(subparsers, "dead", "list, show, replay or purge requests that failed in all attempts")
    actions = dead.add_subparsers(required=True, metavar="ACTION")
    show_list = _command(actions, "list", "list dead letters, oldest first")
    show_list.add_argument("--json", action="store_true", help="print a JSON array")
    show = _command(actions, "show", "show one request: its error, headers and body")
    show.add_argument("id", metavar="ID", help="id of the request")
    replay = _command(actions, "replay", "put requests back on their lanes, with the same id")
    purge = _command(actions, "purge", "delete dead letters")
    for action in (replay, purge):
        which = action.add_mutually_exclusive_group(required=True)
        which.add_argument("id", metavar="ID", nargs="?", help="id of the request")
        which.add_argument("--all", action="store_true", help="all dead letters")
        if action is purge:
            which.add_argument(
                "--older-than", metavar="AGE", help="those that failed longer ago, such as 90s, 30m, 12h or 7d"
            )
    for action, name in ((show_list, "list"), (show, "show"), (replay, "replay"), (purge, "purge")):
        if action is not show:
            action.add_argument("--priority", choices=_PRIORITIES, help="only those of this priority")
        _asks(action, commands.do_dead, action=name)


def _add_key(subparsers: Subparsers) -> None:
    key = _command(subparsers, "key", "add, limit, list or remove API keys of the HTTP gateway")
    actions = key.add_subparsers(required=True, metavar="ACTION")
    add = _command(actions, "add", "make a key, print it once, and add its hash to the settings file")
    add.add_argument(
        "name", metavar="NAME", help="1 to 32 letters or digits; the ids of the key's requests begin with it"
    )
    add.add_argument("--tenant", help="tenant of its requests (default: NAME)")
    add.add_argument("--priority", choices=_PRIORITIES, help="priority of requests that name none (default: medium)")
    add.add_argument("--highest", choices=_PRIORITIES, help="most urgent priority that the key can use (default: high)")
    add.add_argument(
        "--operator",
        action="store_true",
        default=None,
        help="let the key see, cancel, pause and move the requests of all tenants",
    )
    limit = _command(actions, "limit", "change the limits of a key in the settings file")
    limit.add_argument("name", metavar="NAME", help="name of the key")
    for parser in (add, limit):
        unchanged = "by default the setting of the same name" if parser is add else "by default it stays as it is"
        for kind, calls in (("answers", "answers"), ("lists", "lists of models"), ("statistics", "statistics")):
            text = f"most calls for {calls} per second, 0 for no limit; {unchanged}"
            parser.add_argument(f"--{kind}-per-s", type=number, metavar="RATE", help=text)
        unchanged = "by default there is none" if parser is add else "by default it stays as it is"
        for quota in ("requests-per-minute", "tokens-per-minute", "tokens-per-day"):
            text = f"most {quota.replace('-', ' ')}, 0 for no limit; {unchanged}"
            parser.add_argument(f"--{quota}", type=whole, metavar="N", help=text)
    show_list = _command(actions, "list", "list the configured keys")
    remove = _command(actions, "remove", "remove a key from the settings file")
    remove.add_argument("name", metavar="NAME", help="name of the key")
    for action, name in ((add, "add"), (limit, "limit"), (show_list, "list"), (remove, "remove")):
        action.set_defaults(command=commands.do_key, action=name)
        add_options(action, keys=("http_keys",) if action is show_list else ())


def _add_auth(subparsers: Subparsers) -> None:
    auth = _command(subparsers, "auth", "make the nats-server account of a tenant")
    auth.add_argument("tenant", metavar="TENANT", help="1 to 64 letters, digits, - or _; also the name of its user")
    auth.add_argument("--file", type=Path, help="append it to this file, which accounts.conf includes (default: print)")
    auth.set_defaults(command=commands.do_auth)


def _add_models(subparsers: Subparsers) -> None:
    pull = _command(subparsers, "pull", "fetch a model into the store")
    pull.add_argument(
        "name",
        metavar="NAME",
        help="smollm2, a repository on the Hugging Face hub, a GGUF file, or the address of one",
    )
    pull.set_defaults(command=commands.do_pull)
    models = _command(subparsers, "models", "list or remove the stored models")
    models.set_defaults(command=commands.do_models, action="list")
    actions = models.add_subparsers(metavar="ACTION")
    show_list = _command(actions, "list", "list the stored models (default)")
    remove = _command(actions, "rm", "remove a stored model")
    remove.add_argument("name", metavar="NAME", help="name of the model")
    remove.set_defaults(action="rm")
    for parser in (pull, models, show_list, remove):
        add_options(parser, keys=("models_dir",))
