"""How many cores there are, and how the engines of one machine share them.

Two engines that each start a thread on every core are several times slower than two that divide the cores, because the
threads of an engine wait for each other after every product. The budgets add up to the cores, except on one core, where
each engine has one thread.
"""

from __future__ import annotations

from typing import NamedTuple

_SECOND_ENGINES = 3
"""A third of the cores is the second engine's, rounded up. It works only while the first one is saturated."""


class Division(NamedTuple):
    """Threads of MLX and of the second engine. 0: that engine does not use this machine's CPU, or decides itself."""

    mlx: int
    second: int


def usable_cores(cpus: int, quota: float | None) -> int:
    """The whole cores that a process can keep busy: at least 1.

    The rest of a fraction is left to the other processes. A thread more than the quota would stop all of them for a
    part of each period.

    Args:
        cpus: the CPUs that the process may run on.
        quota: the CPU time that it may use, in CPUs; None for no limit.
    """
    return max(1, cpus if quota is None else min(cpus, int(quota)))


def threads_each(threads: int, at_once: int) -> int:
    """The threads of each model of one worker: half of the worker's where two or more are in memory at once.

    The models in memory are rarely all at work. Two that are divide the cores.

    Args:
        threads: of the worker.
        at_once: how many models are in memory at once.
    """
    return max(1, threads // min(at_once, 2))


def divide(cores: int, *, mlx: int = 0, second: int = 0, second_shares: bool) -> Division:
    """Divide the cores between MLX and the second engine.

    Args:
        cores: at least 1.
        mlx: threads that the user gives to MLX; 0 for automatic.
        second: threads that the user gives to the second engine; 0 for automatic.
        second_shares: whether the second engine uses this machine's CPU. Otherwise MLX gets all cores.
    """
    if not second_shares:
        return Division(mlx or cores, second)
    if not second:
        second = max(1, cores - mlx if mlx else -(-cores // _SECOND_ENGINES))
    return Division(mlx or max(1, cores - second), second)
