"""What Linux grants this process: cores, memory, and whether the machine has a GPU. Reads the kernel's files.

And which addresses are this machine's own.

The limits of a container are those of its control group (version 1 or 2) and of the group's parents; the lowest one
counts. Where the parents are hidden, which is usual in a container, the mounted root is the group. Other systems than
Linux have no such limits, and how much of their memory is free is unknown.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
_GPU_DEVICES: Final = ("dev/nvidiactl", "dev/kfd", "dev/dxg")
"""NVIDIA's driver, AMD's, and either of them under WSL."""


def cpu_count() -> int:
    """The number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The CPU time that the control group may use, in CPUs; None for no limit."""
    quotas = []
    for group in _groups(root, "cpu"):
        words = _read(group / "cpu.max").split()
        if not words:
            words = [_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()]
        quota, period = (_count(word) for word in words)
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_available(root: Path = _ROOT) -> int | None:
    """The memory that this process can still take without swapping, in bytes; None where it is not known."""
    lines = _read(root / "proc/meminfo").splitlines()
    rooms = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not rooms:
        return None
    for group in _groups(root, "memory"):
        limit = _count(_read(group / "memory.max") or _read(group / "memory.limit_in_bytes"))
        used = _count(_read(group / "memory.current") or _read(group / "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            rooms.append(max(0, limit - used + _reclaimable(group)))
    return min(rooms)


def memory_total(root: Path = _ROOT) -> int | None:
    """The memory of this machine, or of the control group if that has less, in bytes; None where it is not known."""
    lines = _read(root / "proc/meminfo").splitlines()
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")] or _physical()
    for group in _groups(root, "memory"):
        limit = _count(_read(group / "memory.max") or _read(group / "memory.limit_in_bytes"))
        sizes += [limit] if limit is not None else []
    return min(sizes, default=None)


def _physical() -> list[int]:
    """The machine's memory as POSIX systems tell it; nothing on others."""
    try:
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        return []


def has_gpu(root: Path = _ROOT) -> bool:
    """Whether a GPU that computes is visible."""
    return any((root / device).exists() for device in _GPU_DEVICES)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of its parents, for one controller."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = mount
        elif controller in controllers.split(","):
            base = mount / controller
        else:
            continue
        group = base / path.strip("/")
        yield from (folder for folder in (group, *group.parents) if folder == base or base in folder.parents)


def _reclaimable(group: Path) -> int:
    """The part of the group's memory that holds files, and is given back on demand."""
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _count(text: str) -> int | None:
    """A number in a file of a control group; None for no limit (`max`, -1) and for a file that is not there."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, also one of IPv4 that is written as IPv6, or `localhost`."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_local(host: str) -> bool:
    """Whether a host that is called is this machine: a loopback address, or the address that stands for all."""
    return is_loopback(host) or host in ("0.0.0.0", "::")  # noqa: S104 - recognized, not bound to
