"""What each command does with its options. Each imports what it needs: `headrace --help` must not load an engine."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib import import_module
from pathlib import Path

from pipeline.commands.options import (
    config_from,
    given_options,
    names_a_broker,
    sets,
    settings_file,
    with_keys_file,
)
from pipeline.config import Config, ConfigError
from pipeline.process.lifecycle import Lifecycle, Main, StartError, run

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


def do_up(args: argparse.Namespace) -> int:
    """Run `headrace up`. Return the exit code."""
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


def do_run(args: argparse.Namespace) -> int:
    """Run `headrace run ROLE`. Return the exit code."""
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


def do_demo(args: argparse.Namespace) -> int:
    """Run `headrace demo`. Return the exit code."""
    from pipeline.commands.demo import demo

    config_from(args)
    return demo(seconds=args.seconds, options=given_options(args))


def do_send(args: argparse.Namespace) -> int:
    """Run `headrace send`. Return the exit code."""
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


def do_stats(args: argparse.Namespace) -> int:
    """Run `headrace stats` or `headrace top`. Return the exit code."""
    from pipeline.commands.stats import stats

    return stats(_broker_url(args), as_json=args.json, watch=args.watch)


def do_usage(args: argparse.Namespace) -> int:
    """Run `headrace usage`. Return the exit code."""
    from pipeline.commands.usage import usage

    return usage(_broker_url(args), tenant=args.tenant, as_json=args.json)


def do_bench(args: argparse.Namespace) -> int:
    """Run `headrace bench`. Return the exit code."""
    from pipeline.commands.bench import Benchmark, bench

    if args.requests < 1:
        raise ConfigError("--requests: at least 1 request is needed.")
    benchmark = Benchmark(requests=args.requests, priority=args.priority, model=args.model, max_tokens=args.max_tokens)
    return bench(benchmark, _broker_url(args))


def do_cancel(args: argparse.Namespace) -> int:
    """Run `headrace cancel`. Return the exit code."""
    from pipeline.commands.cancel import cancel

    return cancel(args.id, _broker_url(args))


def do_pause(args: argparse.Namespace) -> int:
    """Run `headrace pause` or `headrace resume`. Return the exit code."""
    from pipeline.commands import operator

    if args.lane is None and args.tenant is None:
        raise ConfigError(f"Name what to {args.action}: a lane, --tenant, or both.")
    change = operator.pause if args.action == "pause" else operator.resume
    return change(_broker_url(args), lane=args.lane, tenant=args.tenant, reason=args.reason)


def do_paused(args: argparse.Namespace) -> int:
    """Run `headrace paused`. Return the exit code."""
    from pipeline.commands.operator import paused

    return paused(_broker_url(args), as_json=args.json, log=args.log)


def do_move(args: argparse.Namespace) -> int:
    """Run `headrace move`. Return the exit code."""
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


def do_batch(args: argparse.Namespace) -> int:
    """Run `headrace batch`. Return the exit code."""
    from pipeline.commands.batch import BatchJob, batch

    return batch(BatchJob(source=args.source, endpoint=args.endpoint, window=args.window), _broker_url(args))


def do_dead(args: argparse.Namespace) -> int:
    """Run `headrace dead ACTION`. Return the exit code."""
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


def do_key(args: argparse.Namespace) -> int:
    """Run `headrace key ACTION`. Return the exit code."""
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


def do_auth(args: argparse.Namespace) -> int:
    """Run `headrace auth`. Return the exit code."""
    from pipeline.commands.auth import auth

    return auth(args.tenant, args.file)


def do_pull(args: argparse.Namespace) -> int:
    """Run `headrace pull`. Return the exit code."""
    from pipeline.commands.pull import pull

    config = config_from(args)
    pulled = import_module("consumers.models.obtain").pulled
    return pull(lambda on_progress: pulled(args.name, config, on_progress))


def do_models(args: argparse.Namespace) -> int:
    """Run `headrace models ACTION`. Return the exit code."""
    from pipeline.commands import models

    store = import_module("consumers.models.store").Store(config_from(args).models_dir)
    if args.action == "rm":
        return models.removed(args.name, store.remove(args.name))
    return models.show_list(store.models(), store.root)


def do_doctor(args: argparse.Namespace) -> int:
    """Run `headrace doctor`. Return the exit code."""
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
    if running is None and config.state_dir and args.command is not do_doctor:
        raise StartError(
            f"No headrace runs on the state folder {config.state_dir}. Start one with `headrace up --state-dir "
            f"{shlex.quote(config.state_dir)}`, or name a broker with --nats-url."
        )
    return running.nats if running is not None else config.nats_url
