"""`headrace up` divides the cores, if the second engine uses them."""

from __future__ import annotations

import sys

import pytest

from pipeline.config import Config
from pipeline.core.cores import usable_cores
from pipeline.machine import cpu_count, cpu_quota
from pipeline.up import reach
from pipeline.up.local import divided
from pipeline.up.reach import is_loopback, ollama_shares_cpu
from tests.consumers.ollama_server import ollama_server

CORES = usable_cores(cpu_count(), cpu_quota())


@pytest.fixture(autouse=True)
def _linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")


def test_both_engines_get_their_share():
    config = divided(Config(), second_shares=True)
    assert config.mlx_threads + config.ollama_threads == max(2, CORES)


def test_mlx_alone_gets_all_cores():
    config = divided(Config(), second_shares=False)
    assert (config.mlx_threads, config.ollama_threads) == (CORES, 0)


def test_the_users_numbers_stay():
    config = divided(Config(mlx_threads=7, ollama_threads=9), second_shares=True)
    assert (config.mlx_threads, config.ollama_threads) == (7, 9)


def test_nothing_is_divided_where_no_model_runs_on_a_cpu(monkeypatch):
    assert divided(Config(engine="simulated"), second_shares=True).ollama_threads == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert divided(Config(), second_shares=True) == Config()


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:11434", True),
        ("http://localhost:11434", True),
        ("http://[::1]:11434", True),
        ("http://192.168.1.20:11434", False),
        ("https://ollama.example/api", False),
        ("http://127.example:11434", False),
    ],
)
def test_a_loopback_address_is_this_machine(url, here):
    assert is_loopback(url) == here


@pytest.mark.parametrize(
    ("loaded", "gpu", "shares"),
    [
        ([{"name": "m:latest", "size_vram": 0}], True, True),
        ([{"name": "m:latest", "size_vram": 5}], False, False),
        ([], False, True),
        ([], True, False),
    ],
)
async def test_a_server_on_this_machine_shares_the_cpu_unless_it_uses_a_gpu(monkeypatch, loaded, gpu, shares):
    monkeypatch.setattr(reach, "has_gpu", lambda: gpu)
    async with ollama_server() as server:
        server.loaded = loaded
        assert await ollama_shares_cpu(server.url) == shares


async def test_a_server_elsewhere_does_not_share_it():
    assert not await ollama_shares_cpu("http://192.0.2.1:11434")
