"""`python -m bench.chaos`: kill every part of a pipeline under load, and check that no answer is lost or doubled."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.chaos.shows import SHOWS
from bench.chaos.story import Plan, run
from pipeline.process.lifecycle import loop_factory


def main() -> int:
    """Returns 0 if every accepted request was answered once and as promised, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="duration of load and faults (default: 600)")
    parser.add_argument("--engine", choices=("simulated", "mlx"), default="simulated")
    parser.add_argument("--seed", type=int, default=1, help="seed of the load and of the faults (default: 1)")
    parser.add_argument("--rate", type=float, help="requests per second (default: 5, with MLX 3)")
    parser.add_argument("--show", choices=SHOWS, help="check one promise instead of the long run")
    parser.add_argument("--keep", action="store_true", help="keep the logs and the broker's store")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    rate_per_s, max_tokens = (5.0, 40) if options.engine == "simulated" else (3.0, 160)
    plan = Plan(options.seconds, options.engine, options.seed, options.rate or rate_per_s, max_tokens)
    if options.show:
        return _show(options.show, folder, plan)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        summary = runner.run(run(plan, folder, lambda line: print(line, flush=True)))
    failed = bool(summary.faults)
    if failed or options.keep:
        print(f"logs and store: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    print("FAILED" if failed else "passed: no answer was lost, and none was doubled")
    return int(failed)


def _show(name: str, folder: Path, plan: Plan) -> int:
    config = plan.config()
    sizes: dict[str, dict[str, Any]] = {
        "kills": {"times": 50, "rate_per_s": plan.rate_per_s},
        "cancelled": {"requests": 10_000},
    }
    if name == "cancelled":
        config = replace(config, slots=32, simulated_tokens_per_s=20_000.0, simulated_answer_tokens=4)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        shown = runner.run(SHOWS[name](folder, config, **sizes.get(name, {})))
    print(*shown.lines, sep="\n")
    print(f"FAILED: {', '.join(shown.wrong)}; logs and store: {folder}" if shown.wrong else f"{name}: passed")
    return int(bool(shown.wrong))


if __name__ == "__main__":
    sys.exit(main())
