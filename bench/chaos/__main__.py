"""`python -m bench.chaos`: kill everything for a while, and show that nothing was lost and nothing said twice."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from bench.chaos.story import Plan, run
from pipeline.lifecycle import loop_factory


def main() -> int:
    """Returns 0 where every accepted request was answered once and as promised, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long to load and torment (default: 600)")
    parser.add_argument("--engine", choices=("simulated", "mlx"), default="simulated")
    parser.add_argument("--seed", type=int, default=1, help="of the load and of the faults")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (default: 6)")
    parser.add_argument("--keep", action="store_true", help="keep the logs and the broker's store")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    plan = Plan(options.seconds, options.engine, options.seed, options.rate)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        summary = runner.run(run(plan, folder, lambda line: print(line, flush=True)))
    failed = bool(summary.faults)
    if failed or options.keep:
        print(f"logs and store: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    print("FAILED" if failed else "passed: nothing was lost, nothing was said twice")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
