"""The command line: the commands of `headrace`, their options, and the exit codes.

0: success. 1: failure; stderr has the reason. 2: an invalid option or setting. 130: interrupted.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from pipeline import __version__
from pipeline.commands.options import (
    CLIENT_KEYS,
    add_options,
    config_from,
    given_options,
    names_a_broker,
    sets,
    settings_file,
    with_keys_file,
)
from pipeline.config import Config, ConfigError
from pipeline.process.lifecycle import Lifecycle, Main, StartError, end_quickly, run

# The module of each role. The pipeline imports its consumers here only, by name.
ROLE_MODULES = {
    "mlx": "consumers.mlx",
    "ollama": "consumers.ollama",
    "openai": "consumers.openai",
    "router": "consumers.router",
    "monitor": "consumers.monitor",
    "batches": "consumers.batches",
    "gateway": "pipeline.gateway.main",
}

# How long a role waits for its broker, which may be starting at the same time.
BROKER_PATIENCE_S = 5.0

# A full disk, a quota, or a device that fails, behind stdout.
_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

_STDERR = 2

_USAGE = "%(prog)s [OPTION ...]"

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    end_quickly()
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without Unicode gets question marks, and no traceback.
            stream.reconfigure(errors="replace")
    parser = build_parser()
    args = parser.parse_args(argv)
    command: Command = args.command
    try:
        return command(args)
    except ConfigError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _forget_output()
        return 0
    except SystemExit as error:
        # rich ends the process with code 1 where the reader of stdout has closed it.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return 0
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _forget_output()
        print(f"headrace: The output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _open_closed_streams() -> None:
    """Give a command that was started with a closed stdin, stdout or stderr (`<&-`) one that leads nowhere.

    The next file that the process opens would get the stream's number, also in the processes that it starts. libuv
    aborts a process that closes a file under such a number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115 - open as long as the process runs
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - as above
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 - as above


def _forget_output() -> None:
    """Nothing takes what is written to stdout. Without this, Python reports the error again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. It stores the function of the command as `command`."""
    parser = argparse.ArgumentParser(
        prog="headrace", description="A priority queue in front of local language models, on NATS JetStream."
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_servers(commands)
    _add_clients(commands)
    return parser


def _add_servers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = commands.add_parser("up", help="run everything on this machine, including the broker", usage=_USAGE)
    up.add_argument("--ready-file", metavar="PATH", help="write a file when everything is ready; remove it at the end")
    add_options(up)
    up.set_defaults(command=_up)

    role = commands.add_parser("run", help="run one role against a broker", usage="%(prog)s ROLE [OPTION ...]")
    role.add_argument("role", metavar="ROLE", choices=ROLE_MODULES, help=", ".join(ROLE_MODULES))
    role.add_argument("--url", dest="openai", action="append", metavar="URL", help="the server of `run openai`")
    add_options(role)
    role.set_defaults(command=_run)

    demo = commands.add_parser(
        "demo", help="start a separate pipeline, overload it and show what happens", usage=_USAGE
    )
    demo.add_argument(
        "--seconds", type=float, default=30.0, metavar="SECONDS", help="how long to send requests (default: 30)"
    )
    add_options(demo)
    demo.set_defaults(command=_demo)


def _add_clients(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    send = commands.add_parser("send", help="send a prompt and print the answer")
    send.add_argument("text", metavar="TEXT", help="the prompt; - reads it from standard input")
    send.add_argument("--priority", choices=("high", "medium", "low"), default="medium", help="default: medium")
    send.add_argument("--model", help="the model that must answer; any model by default")
    send.add_argument(
        "--task", choices=("simple", "complex"), help="whether a smaller model can answer; headrace decides by default"
    )
    send.add_argument("--max-tokens", type=int, metavar="N", help="maximum length of the answer, in tokens")
    send.add_argument("--timeout", type=float, metavar="SECONDS", help="give up if there is no answer within SECONDS")
    send.add_argument("--no-stream", dest="stream", action="store_false", help="print the answer when it is complete")
    send.add_argument("-v", "--verbose", action="store_true", help="print progress (queue, engine, timing) to stderr")
    send.set_defaults(command=_send)

    stats, top, bench = _add_watchers(commands)
    cancel = commands.add_parser("cancel", help="cancel a request")
    cancel.add_argument("id", metavar="ID", help="id of the request")
    cancel.set_defaults(command=_cancel)

    _add_operator(commands)
    _add_batch(commands)
    _add_dead(commands)
    _add_key(commands)
    _add_auth(commands)
    _add_models(commands)

    doctor = commands.add_parser("doctor", help="check what headrace needs and suggest fixes", usage=_USAGE)
    add_options(doctor)
    doctor.set_defaults(command=_doctor)
    for parser in (send, stats, top, bench, cancel):
        add_options(parser, keys=CLIENT_KEYS)


def _add_watchers(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    stats = commands.add_parser("stats", help="show the statistics of the queue")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--watch", action="store_true", help="update every second until interrupted")
    stats.set_defaults(command=_stats)
    usage = commands.add_parser("usage", help="show the requests and tokens of each tenant and API key")
    usage.add_argument("--tenant", default="", metavar="NAME", help="only this tenant, which its own user can ask for")
    usage.add_argument("--json", action="store_true", help="print JSON")
    usage.set_defaults(command=_usage)
    add_options(usage, keys=CLIENT_KEYS)
    top = commands.add_parser("top", help="show the statistics, updated every second; the same as `stats --watch`")
    top.set_defaults(command=_stats, json=False, watch=True)

    bench = commands.add_parser("bench", help="measure how fast the running pipeline answers")
    bench.add_argument("--requests", type=int, default=8, metavar="N", help="how many to send (default: 8)")
    bench.add_argument("--priority", choices=("high", "medium", "low"), default="medium", help="default: medium")
    bench.add_argument("--model", help="the model that must answer; any model by default")
    bench.add_argument("--max-tokens", type=int, default=64, metavar="N", help="length of each answer (default: 64)")
    bench.set_defaults(command=_bench)
    return stats, top, bench


def _add_operator(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    priorities = ("high", "medium", "low")
    for name, text in (("pause", "let nothing more of a lane or a tenant begin"), ("resume", "end a pause")):
        scope = commands.add_parser(name, help=text)
        scope.add_argument("lane", metavar="LANE", nargs="?", choices=priorities, help="high, medium or low")
        scope.add_argument("--tenant", metavar="NAME", help="of this tenant only; `default` is the default tenant")
        scope.add_argument("--reason", default="", metavar="TEXT", help="kept with the pause, and shown")
        scope.set_defaults(command=_pause, action=name)
        add_options(scope, keys=CLIENT_KEYS)
    paused = commands.add_parser("paused", help="list what is paused, by whom and why")
    paused.add_argument("--json", action="store_true", help="print JSON")
    paused.add_argument("--log", action="store_true", help="list the latest pauses and resumes instead")
    paused.set_defaults(command=_paused)
    move = commands.add_parser("move", help="change the priority of queued requests")
    move.add_argument("id", metavar="ID", nargs="?", help="id of one request; for that of a tenant, t.TENANT.ID")
    move.add_argument("priority", metavar="PRIORITY", choices=priorities, help="high, medium or low")
    move.add_argument("--batch", metavar="ID", help="all queued lines of a batch")
    move.add_argument("--tenant", metavar="NAME", help="all queued requests of a tenant")
    move.add_argument("--reason", default="", metavar="TEXT", help="written to the log")
    move.set_defaults(command=_move)
    for parser in (paused, move):
        add_options(parser, keys=CLIENT_KEYS)


def _add_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser("batch", help="run the lines of a file at LOW and write the results beside it")
    batch.add_argument("source", metavar="FILE", help="a JSONL file as for OpenAI's Batch API, or the id of a batch")
    batch.add_argument(
        "--endpoint", metavar="PATH", help="the endpoint of every line (default: that of the first line)"
    )
    batch.add_argument(
        "--window", default="24h", metavar="TIME", help="time in which the batch must end, such as 30m or 24h"
    )
    batch.set_defaults(command=_batch)
    add_options(batch, keys=CLIENT_KEYS)


def _add_dead(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    dead = commands.add_parser("dead", help="list, show, replay or purge requests that failed in all attempts")
    actions = dead.add_subparsers(required=True, metavar="ACTION")
    show_list = actions.add_parser("list", help="list dead letters, oldest first")
    show_list.add_argument("--json", action="store_true", help="print a JSON array")
    show = actions.add_parser("show", help="show one request: its error, headers and body")
    show.add_argument("id", metavar="ID", help="id of the request")
    replay = actions.add_parser("replay", help="put requests back on their lanes, with the same id")
    purge = actions.add_parser("purge", help="delete dead letters")
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
            action.add_argument("--priority", choices=("high", "medium", "low"), help="only those of this priority")
        action.set_defaults(command=_dead, action=name)
        add_options(action, keys=CLIENT_KEYS)


def _add_key(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    key = commands.add_parser("key", help="add, limit, list or remove API keys of the HTTP gateway")
    actions = key.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key, print it once, and add its hash to the settings file")
    add.add_argument(
        "name", metavar="NAME", help="1 to 32 letters or digits; the ids of the key's requests begin with it"
    )
    add.add_argument("--tenant", help="tenant of its requests (default: NAME)")
    add.add_argument(
        "--priority", choices=("high", "medium", "low"), help="priority of requests that name none (default: medium)"
    )
    add.add_argument(
        "--highest", choices=("high", "medium", "low"), help="most urgent priority that the key can use (default: high)"
    )
    add.add_argument(
        "--operator",
        action="store_true",
        default=None,
        help="let the key see, cancel, pause and move the requests of all tenants",
    )
    limit = actions.add_parser("limit", help="change the limits of a key in the settings file")
    limit.add_argument("name", metavar="NAME", help="name of the key")
    for parser in (add, limit):
        unchanged = "by default the setting of the same name" if parser is add else "by default it stays as it is"
        for kind, calls in (("answers", "answers"), ("lists", "lists of models"), ("statistics", "statistics")):
            text = f"most calls for {calls} per second, 0 for no limit; {unchanged}"
            parser.add_argument(f"--{kind}-per-s", type=float, metavar="RATE", help=text)
        unchanged = "by default there is none" if parser is add else "by default it stays as it is"
        for quota in ("requests-per-minute", "tokens-per-minute", "tokens-per-day"):
            text = f"most {quota.replace('-', ' ')}, 0 for no limit; {unchanged}"
            parser.add_argument(f"--{quota}", type=int, metavar="N", help=text)
    show_list = actions.add_parser("list", help="list the configured keys")
    remove = actions.add_parser("remove", help="remove a key from the settings file")
    remove.add_argument("name", metavar="NAME", help="name of the key")
    for action, name in ((add, "add"), (limit, "limit"), (show_list, "list"), (remove, "remove")):
        action.set_defaults(command=_key, action=name)
        add_options(action, keys=("http_keys",) if action is show_list else ())


def _add_auth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    auth = commands.add_parser("auth", help="make the nats-server account of a tenant")
    auth.add_argument("tenant", metavar="TENANT", help="1 to 64 letters, digits, - or _; also the name of its user")
    auth.add_argument("--file", type=Path, help="append it to this file, which accounts.conf includes (default: print)")
    auth.set_defaults(command=_auth)


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pull = commands.add_parser("pull", help="fetch a model into the store")
    pull.add_argument(
        "name",
        metavar="NAME",
        help="smollm2, a repository on the Hugging Face hub, a GGUF file, or the address of one",
    )
    pull.set_defaults(command=_pull)
    models = commands.add_parser("models", help="list or remove the stored models")
    models.set_defaults(command=_models, action="list")
    actions = models.add_subparsers(metavar="ACTION")
    show_list = actions.add_parser("list", help="list the stored models (default)")
    remove = actions.add_parser("rm", help="remove a stored model")
    remove.add_argument("name", metavar="NAME", help="name of the model")
    remove.set_defaults(action="rm")
    for parser in (pull, models, show_list, remove):
        add_options(parser, keys=("models_dir",))


def _up(args: argparse.Namespace) -> int:
    from pipeline.gateway.identity import check_exposure
    from pipeline.up.local import up

    config = with_keys_file(config_from(args), args)
    check_exposure(config)
    ready_file = Path(args.ready_file).absolute() if args.ready_file else None
    return up(
        config,
        own_broker=not names_a_broker(args),
        ready_file=ready_file,
        model_named=sets(args, "model") or sets(args, "models"),
        settings_file=settings_file(args),
    )


def _run(args: argparse.Namespace) -> int:
    from pipeline.broker.connection import BusError
    from pipeline.broker.topology import TopologyError
    from pipeline.up.reach import broker_trouble

    role: Main = import_module(ROLE_MODULES[args.role]).main

    async def main(config: Config, lifecycle: Lifecycle) -> None:
        if trouble := await broker_trouble(config.nats_url, patience_s=BROKER_PATIENCE_S):
            raise StartError(f"{trouble} --nats-url names another server.")
        try:
            await role(config, lifecycle)
        except (BusError, TopologyError) as error:
            raise StartError(str(error)) from error

    return run(main, with_keys_file(config_from(args), args), args.role)


def _demo(args: argparse.Namespace) -> int:
    from pipeline.commands.demo import demo

    config_from(args)
    return demo(seconds=args.seconds, options=given_options(args))


def _send(args: argparse.Namespace) -> int:
    from pipeline.commands.send import Sending, send

    try:
        text = sys.stdin.read() if args.text == "-" else args.text
        text.encode()
    except UnicodeError:
        raise ConfigError("The prompt is not valid UTF-8.") from None
    if not text.strip():
        raise ConfigError("The prompt is empty.")
    sending = Sending(
        text=text,
        priority=args.priority,
        model=args.model,
        task=args.task,
        max_tokens=args.max_tokens,
        timeout_s=args.timeout,
        stream=args.stream,
        verbose=args.verbose,
    )
    return send(sending, _broker_url(args))


def _stats(args: argparse.Namespace) -> int:
    from pipeline.commands.stats import stats

    return stats(_broker_url(args), as_json=args.json, watch=args.watch)


def _usage(args: argparse.Namespace) -> int:
    from pipeline.commands.usage import usage

    return usage(_broker_url(args), tenant=args.tenant, as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    from pipeline.commands.bench import Benchmark, bench

    if args.requests < 1:
        raise ConfigError("--requests: at least 1 request is needed.")
    benchmark = Benchmark(requests=args.requests, priority=args.priority, model=args.model, max_tokens=args.max_tokens)
    return bench(benchmark, _broker_url(args))


def _cancel(args: argparse.Namespace) -> int:
    from pipeline.commands.cancel import cancel

    return cancel(args.id, _broker_url(args))


def _pause(args: argparse.Namespace) -> int:
    from pipeline.commands import operator

    if args.lane is None and args.tenant is None:
        raise ConfigError(f"headrace {args.action}: name a lane, --tenant, or both.")
    change = operator.pause if args.action == "pause" else operator.resume
    return change(_broker_url(args), lane=args.lane, tenant=args.tenant, reason=args.reason)


def _paused(args: argparse.Namespace) -> int:
    from pipeline.commands.operator import paused

    return paused(_broker_url(args), as_json=args.json, log=args.log)


def _move(args: argparse.Namespace) -> int:
    from pipeline.commands.operator import move
    from pipeline.wire.pauses import MoveCall
    from pipeline.wire.subjects import Priority, split_name

    which = (args.id, args.batch, args.tenant)
    if "" in which:
        raise ConfigError("headrace move: the ID, --batch and --tenant must not be empty.")
    if not any(which):
        raise ConfigError("headrace move: name a request, --batch or --tenant.")
    tenant, request_id = split_name(args.id or "")
    call = MoveCall(Priority(args.priority), request_id, args.batch or "", args.tenant or tenant or None)
    call.reason = args.reason
    return move(_broker_url(args), call)


def _batch(args: argparse.Namespace) -> int:
    from pipeline.commands.batch import BatchJob, batch

    return batch(BatchJob(source=args.source, endpoint=args.endpoint, window=args.window), _broker_url(args))


def _dead(args: argparse.Namespace) -> int:
    from pipeline.broker.letters import Chosen
    from pipeline.commands import dead
    from pipeline.wire.subjects import Priority

    try:
        older_than_s = dead.age_s(getattr(args, "older_than", None) or "0s")
    except ValueError as error:
        print(f'headrace: --older-than: "{error}" is not an age such as 90s, 30m, 12h or 7d.', file=sys.stderr)
        return 2
    priority = getattr(args, "priority", None)
    chosen = Chosen(
        id=getattr(args, "id", None), priority=Priority(priority) if priority else None, older_than_s=older_than_s
    )
    if args.action == "list":
        return dead.show_list(_broker_url(args), chosen, as_json=args.json)
    return {"show": dead.show, "replay": dead.replay, "purge": dead.purge}[args.action](_broker_url(args), chosen)


def _key(args: argparse.Namespace) -> int:
    from pipeline.commands import key

    if args.action == "list":
        return key.show_list(config_from(args))
    file = settings_file(args)
    if args.action == "remove":
        return key.remove(file, args.name)
    limits = {field: getattr(args, field) for field in key.LIMITS}
    if args.action == "limit":
        return key.limit(file, args.name, limits)
    fields = ("tenant", "priority", "highest", "operator")
    return key.add(file, args.name, {field: getattr(args, field) for field in fields} | limits)


def _auth(args: argparse.Namespace) -> int:
    from pipeline.commands.auth import auth

    return auth(args.tenant, args.file)


def _pull(args: argparse.Namespace) -> int:
    from pipeline.commands.pull import pull

    config = config_from(args)
    pulled = import_module("consumers.models.obtain").pulled
    return pull(lambda on_progress: pulled(args.name, config, on_progress))


def _models(args: argparse.Namespace) -> int:
    from pipeline.commands import models

    store = import_module("consumers.models.store").Store(config_from(args).models_dir)
    if args.action == "rm":
        return models.removed(args.name, store.remove(args.name))
    return models.show_list(store.models(), store.root)


def _doctor(args: argparse.Namespace) -> int:
    from pipeline.commands.doctor import doctor

    config = config_from(args)
    about = import_module("consumers.models.obtain").about(config)
    return doctor(config, _broker_url(args), about)


def _broker_url(args: argparse.Namespace) -> str:
    """The broker of the settings, or of the instance that runs on the state folder, or the default.

    Raises:
        StartError: a state folder is set, and no instance runs on it. Another one must not be asked instead.
    """
    from pipeline.up.instance import find

    config = config_from(args)
    if names_a_broker(args):
        return config.nats_url
    running = find(config)
    if running is None and config.state_dir and args.command is not _doctor:
        raise StartError(
            f"No headrace runs on the state folder {config.state_dir}. Start one with `headrace up --state-dir "
            f"{shlex.quote(config.state_dir)}`, or name a broker with --nats-url."
        )
    return running.nats if running is not None else config.nats_url


if __name__ == "__main__":
    sys.exit(main())
