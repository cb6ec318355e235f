"""What a HIGH question feels as the load grows beyond what the engine can do, under five policies.

    python -m bench.sweep [--model DIR] [--loads X ...] [--policies NAME ...] [--questions N]

Requests arrive at random times (Poisson), whether or not earlier ones are answered. Their lengths have the quantiles
of the conversations in the Azure LLM inference trace 2023 (Patel et al., "Splitwise", ISCA 2024; CC-BY), divided by
four. HIGH asks short questions at the same rate under every load, at most a tenth of all tokens. A time to the first
text counts from the moment at which the request was due.

The capacity is what mlx-lm's `BatchGenerator` does with 32 such requests that are inserted at once. Without `--model`,
a model with random weights and 3.8 million parameters is made.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench import random_model
from bench.bare import Job, run
from bench.isolation import answer, caller, quantile
from bench.peer import mlx_lm_server
from bench.running import ALONE, up

# Twentieths, from the shortest to the longest but for the last twentieth.
PROMPTS = (2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315, 1877, 2735, 4083)
ANSWERS = (7, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424, 451)
SCALE = 4
WORDS = (
    "river",
    "stone",
    "bridge",
    "window",
    "garden",
    "winter",
    "letter",
    "music",
    "horse",
    "bread",
    "light",
    "paper",
)
HIGH_WORDS, HIGH_TOKENS = 8, 16
# Of the tokens that the engine can do; a tenth of the offered ones under the lowest load.
HIGH_SHARE, LEAST_LOAD = 0.03, 0.3
GOALS = {1.0: 1.2, 2.0: 1.5, 4.0: 2.0}
# The part of the time before the first question that counts.
BEFORE = 0.2


class Policy(NamedTuple):
    """How requests are served: settings of headrace, the lane of HIGH's questions and that of the others."""

    settings: Mapping[str, str] | None
    high: str = "high"
    other: str = "low"


POLICIES = {
    "mlx_lm.server": Policy(None),
    "first-in-first-out": Policy({}, high="low"),
    "strict": Policy({"WEIGHTS": '{"high":1e6,"medium":1e3,"low":1}', "FLOOR_SHARE": "0", "MAX_PREEMPTIONS": "0"}),
    "no-preemption": Policy({"MAX_PREEMPTIONS": "0"}),
    "headrace": Policy({}),
}


class Request(NamedTuple):
    """A request, and when it is due: in seconds from the start."""

    due_s: float
    prompt: str
    tokens: int
    high: bool


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(max(1, words)))


def between(rng: random.Random, quantiles: Sequence[int]) -> int:
    """A random length with these quantiles, divided by SCALE."""
    at = rng.randrange(len(quantiles) - 1)
    return max(1, round(rng.uniform(quantiles[at], quantiles[at + 1]) / SCALE))


def other(rng: random.Random, due_s: float) -> Request:
    return Request(due_s, text(rng, between(rng, PROMPTS)), between(rng, ANSWERS), high=False)


def question(rng: random.Random, due_s: float) -> Request:
    return Request(due_s, text(rng, HIGH_WORDS), HIGH_TOKENS, high=True)


def arrivals(per_s: float, high_per_s: float, seconds: float) -> list[Request]:
    """Two independent Poisson processes, in the order of time. The same for every policy."""
    found = []
    for make, rate, seed in ((other, per_s, 1), (question, high_per_s, 2)):
        rng, at = random.Random(seed), 0.0
        while (at := at + rng.expovariate(rate)) < seconds:
            found.append(make(rng, at))
    return sorted(found, key=lambda request: request.due_s)


def capacity(model: Path) -> float:
    """Requests like the others that the bare generator finishes in a second."""
    rng = random.Random(3)
    sample = [other(rng, 0.0) for _ in range(32)]
    (took,) = run(model, [Job([one.prompt for one in sample], [one.tokens for one in sample])])
    return len(sample) / took.whole_s


async def offered(url: str, requests: Sequence[Request], policy: Policy, since_s: float) -> tuple[list[float], int]:
    """Send each request when it is due. Returns HIGH's times to the first text, and how many others were answered.

    The run ends with the last question's answer; what is left of the others is hung up.
    """
    clock = asyncio.get_running_loop()
    began_at, first_s, answered = clock.time(), [], 0

    async def one(request: Request) -> None:
        nonlocal answered
        client = caller(url, request.prompt, policy.high if request.high else policy.other, request.tokens)
        await client.open()
        try:
            late_s = clock.time() - began_at - request.due_s
            took_s, _ = await answer(client)
            answered += not request.high
            if request.high and request.due_s >= since_s:
                first_s.append(late_s + took_s)
        finally:
            client.hang_up()

    tasks: dict[asyncio.Task[None], bool] = {}
    for request in requests:
        await asyncio.sleep(began_at + request.due_s - clock.time())
        tasks[asyncio.create_task(one(request))] = request.high
    await asyncio.gather(*[task for task, high in tasks.items() if high])
    for task in tasks:
        task.cancel()
    failed = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Exception)]
    if failed:
        raise failed[0]
    return first_s, answered


@contextmanager
def serving(model: Path, policy: Policy) -> Iterator[str]:
    """Run a server with this policy; yields its URL."""
    if policy.settings is None:
        with mlx_lm_server(model) as url:
            yield url
        return
    own = {"MODEL": str(model), "HTTP_ANSWERS_PER_S": "0", "HTTP_CONNECTIONS": "20000", "DRAIN_TIMEOUT_S": "1"}
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | own | policy.settings) as here:
        yield here["http"]


def measured(model: Path, policy: Policy, load: float, can: float, questions: int) -> tuple[list[float], float]:
    """HIGH's times to the first text under this load, and the other requests answered per second."""
    mean = sum(PROMPTS + ANSWERS) / len(PROMPTS) / SCALE
    high_per_s = HIGH_SHARE * can * mean / (HIGH_WORDS + HIGH_TOKENS)
    seconds = questions / high_per_s / (1 - BEFORE)
    requests = arrivals((load - HIGH_SHARE) * can, high_per_s, seconds)
    with serving(model, policy) as url:
        first_s, answered = asyncio.run(offered(url, requests, policy, BEFORE * seconds))
    return first_s, answered / seconds


def main() -> int:
    """Returns 0: the goals are printed beside what was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: random weights)")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[LEAST_LOAD, *GOALS], metavar="X", help="times capacity"
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=[*POLICIES], help="which (default: all)")
    parser.add_argument("--questions", type=int, default=120, metavar="N", help="of HIGH in each run (default: 120)")
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as made:
        model = given.model.resolve() if given.model else random_model.make(Path(made) / "random")
        can = capacity(model)
        print(f"capacity: {can:.2f} requests/s; HIGH's first text, seconds ({given.questions} questions each)\n")
        print(f"{'':<19} {'load':>5} {'p50':>7} {'p95':>7} {'p99':>7} {'p99 x':>7} {'others/s':>9}  goal")
        for name in given.policies:
            least = 0.0
            for load in given.loads:
                times, rate = measured(model, POLICIES[name], load, can, given.questions)
                p50, p95, p99 = (quantile(times, part) for part in (0.5, 0.95, 0.99))
                least = least or p99
                goal = GOALS.get(load)
                met = f"{goal:g}: {'met' if p99 <= goal * least else 'missed'}" if goal else ""
                print(
                    f"{name:<19} {load:5g} {p50:7.2f} {p95:7.2f} {p99:7.2f} {p99 / least:7.2f} {rate:9.2f}  {met}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
