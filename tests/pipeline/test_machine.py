"""Limits of control groups, as they are in the files of Linux."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.machine import cpu_count, cpu_quota, has_gpu, is_loopback, memory_available, memory_total

GROUPS = "sys/fs/cgroup"


@pytest.fixture
def linux(tmp_path: Path):
    """Writes files below a root, by their path."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    write(**{"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"})
    return write


def test_this_machine_has_a_cpu():
    assert cpu_count() >= 1


def test_without_control_groups_there_is_no_limit(linux):
    root = linux()
    assert cpu_quota(root) is None
    assert memory_available(root) == 8000 * 1024
    assert memory_total(root) == 9000 * 1024


def test_elsewhere_than_on_linux_nothing_is_known(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert memory_available(tmp_path) is None
    assert memory_total(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "POSIX tells it"


def test_version_2_counts_the_lowest_limit_of_the_group_and_its_parents(linux):
    root = linux(
        **{
            "proc/self/cgroup": "0::/box/inner\n",
            f"{GROUPS}/box/inner/cpu.max": "max 100000\n",
            f"{GROUPS}/box/cpu.max": "150000 100000\n",
            f"{GROUPS}/box/inner/memory.max": "max\n",
            f"{GROUPS}/box/inner/memory.current": "1000\n",
            f"{GROUPS}/box/memory.max": "4000000\n",
            f"{GROUPS}/box/memory.current": "3000000\n",
            f"{GROUPS}/box/memory.stat": "anon 2000000\ninactive_file 500000\n",
        }
    )
    assert cpu_quota(root) == 1.5
    assert memory_available(root) == 1_500_000
    assert memory_total(root) == 4_000_000


def test_version_1_has_a_folder_for_each_controller(linux):
    root = linux(
        **{
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/other\n",
            f"{GROUPS}/cpu/box/cpu.cfs_quota_us": "50000\n",
            f"{GROUPS}/cpu/box/cpu.cfs_period_us": "100000\n",
            f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1\n",
            f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n",
            f"{GROUPS}/memory/box/memory.limit_in_bytes": "2000000\n",
            f"{GROUPS}/memory/box/memory.usage_in_bytes": "2500000\n",
            f"{GROUPS}/memory/box/memory.stat": "total_inactive_file 0\n",
        }
    )
    assert cpu_quota(root) == 0.5
    assert memory_available(root) == 0
    assert memory_total(root) == 2_000_000


def test_a_group_whose_path_is_hidden_is_the_mounted_root(linux):
    root = linux(**{"proc/self/cgroup": "4:cpu:/docker/0123\n"})
    linux(**{f"{GROUPS}/cpu/cpu.cfs_quota_us": "200000\n", f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n"})
    assert cpu_quota(root) == 2.0


def test_a_gpu_is_recognized_by_its_driver(linux):
    assert not has_gpu(linux())
    assert has_gpu(linux(**{"dev/nvidiactl": ""}))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1")],
        *[(host, False) for host in ("0.0.0.0", "192.168.1.2", "::", "example.org", "127.example.org")],
    ],
)
def test_loopback_is_told_from_what_others_reach(host: str, expected: bool):
    assert is_loopback(host) is expected
