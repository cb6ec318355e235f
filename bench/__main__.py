"""`python -m bench [NAME ...]`: all benchmarks, or those that are named, one after another, each in its own process."""

from __future__ import annotations

import argparse
import subprocess
import sys

BENCHMARKS = {
    "gateway": "what going through the gateway and its durable queue costs",
    "flood": "whether one client that floods the lists slows the others",
    "hangups": "how soon the slots of clients that hang up are free again",
    "classifier": "what triage gets right, what it costs, and the scores that were tried in its place",
    "durability": "what a PubAck costs, by what it promises",
    "replies": "what it costs that an answer outlives its broker",
    "monitor": "what a long queue costs the monitor, and how soon another one takes over",
    "shares": "how closely the service of the lanes follows their weights",
    "tenants": "whether tenants get equal shares of a lane, how soon a new one begins, and what many names cost",
    "predictions": "how well the wait of a queued request is predicted",
    "spill": "what spilling gains against MLX alone, and how soon it sets in",
    "throughput": "the engine's tokens per second against those of mlx-lm's own generator",
    "overhead": "what priorities, preemption and traces cost in throughput",
    "cache": "what the prompt cache saves, and whether texts are the same with it",
    "isolation": "what a HIGH question feels of the LOW answers beside it",
    "sweep": "what a HIGH question feels as the load grows, beside mlx_lm.server and simpler policies",
    "models": "what swapping three models in the memory for two costs, and what HIGH feels of it",
    "hop": "what a worker costs between the broker and an engine that takes no time",
    "structured": "what answers of a given form cost, and whether they have it",
    "batches": "whether a long batch gets each line once while processes are killed, and what HIGH feels of it",
    "loop_lag": "how late the MLX worker's event loop is under a full batch",
}


def main() -> int:
    """Returns 0 where every benchmark ran to its end."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks. Each has options of its own: `python -m bench.NAME --help`.",
        epilog="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of " + ", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    failed = []
    for name in names:
        print(f"\n== {name}: {BENCHMARKS[name]}\n", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
