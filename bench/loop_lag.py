"""The lag of the MLX worker's event loop while the engine runs a full batch.

    python -m bench.loop_lag [--slots 8 16] [--seconds S]

Runs the same parts as `headrace run mlx` in this process: the worker, its leases, fenced chunks stored at a real
broker, and the engine's child process with the demo model. The lag is how late a 10 ms timer fires, measured while
every slot is in use. `own` is the part of the lag that this process spent computing. The rest is due to the machine,
whose cores the engine and the broker use as well. The row `idle` shows the same loop with nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.servers import single
from consumers.engines.local.process import EngineProcess
from consumers.models.names import located, served_name_of
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.delivery.lanes import MLX_SOURCE
from pipeline.process.lifecycle import Lifecycle, loop_factory
from pipeline.process.role import role
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS
from pipeline.worker.worker import Worker

TIMER_S = 0.01
IDLE_S = 3.0
START_TIMEOUT_S = 60.0
# Prompts with answers that reach the token limit.
PROMPTS = ("Tell me a story about a fox.", "Tell me a story about the sea.", "Count from one to fifty.")


@dataclass
class Lags:
    """Lags and the own part of each, in ms, while the batch was full; `samples` counts all timers."""

    lags_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)
    samples: int = 0

    def line(self) -> str:
        """The row of the table."""
        cells = []
        for values in (self.lags_ms, self.own_ms):
            cut = statistics.quantiles(values, n=100)
            cells += [cut[49], cut[98], max(values)]
        return "  ".join(f"{cell:7.2f}" for cell in cells) + f"  {len(self.lags_ms):7}"


async def sample(seconds: float, engine: EngineProcess | None) -> Lags:
    """Measure lags for a time; with an engine, only while its batch is full."""
    found, end_at = Lags(), time.perf_counter() + seconds
    while (asked_at := time.perf_counter()) < end_at:
        computed_s = time.thread_time()
        await asyncio.sleep(TIMER_S)
        lag_s = max(0.0, time.perf_counter() - asked_at - TIMER_S)
        found.samples += 1
        if engine is None or engine.status().slots_used == engine.status().slots_total:
            found.lags_ms.append(lag_s * 1e3)
            found.own_ms.append(min(lag_s, time.thread_time() - computed_s) * 1e3)
    return found


async def queue(bus: Bus, requests: int) -> None:
    """Store streamed requests before the measurement."""
    for number in range(requests):
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "stream": True, "max_tokens": 200, "temperature": 1.0}
        headers = {MSG_ID: f"lag-{number}"}
        await bus.store("llm.request.medium.complex", msgspec.json.encode(body), headers=headers)


async def measure(slots: int, seconds: float, folder: Path) -> None:
    async with single(folder) as url:
        config = Config(nats_url=url, state_dir=str(folder / "state"), slots=slots, model="demo")
        idle = await sample(IDLE_S, None)
        model_path, served_name = located(config.model), served_name_of(config.model)
        async with (
            role("mlx", config) as me,
            EngineProcess(config, model_path=model_path, served_name=served_name) as engine,
        ):
            worker = Worker(me, engine, config, MLX_SOURCE)
            lifecycle = Lifecycle("mlx", drain_timeout_s=5)
            await queue(me.bus, int(slots * seconds * 2))
            serving = asyncio.create_task(worker.run(lifecycle))
            give_up_at = time.monotonic() + START_TIMEOUT_S
            while engine.status().slots_used < slots:
                assert time.monotonic() < give_up_at, "the batch was never full"
                await asyncio.sleep(0.1)
            waiting = (await me.bus.stream_state(STREAM_REQUESTS)).messages
            full = await sample(seconds, engine)
            status = engine.status()
            left = (await me.bus.stream_state(STREAM_REQUESTS)).messages
            lifecycle.stop(drain_s=0)
            await serving
    assert left, "too few requests: the batch was not full to the end"
    share = len(full.lags_ms) / full.samples
    print(f"{'idle':10}  {idle.line()}")
    print(
        f"{f'{slots} slots':10}  {full.line()}  {share:4.0%} of the time full, "
        f"{status.tokens_per_s:.0f} tokens/s, {(waiting - left) / seconds:.1f} answers/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the lag of the MLX worker's event loop under a full batch.")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seconds", type=float, default=15.0, help="time per number of slots (default: 15)")
    options = parser.parse_args()
    print("lag, ms         p50      p99      max  own p50      p99      max  samples")
    for slots in options.slots:
        with (
            tempfile.TemporaryDirectory(prefix="headrace-lag-") as name,
            asyncio.Runner(loop_factory=loop_factory()) as runner,
        ):
            runner.run(measure(slots, options.seconds, Path(name)))


if __name__ == "__main__":
    main()
