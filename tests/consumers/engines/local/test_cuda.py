"""MLX's build for CUDA, as far as it shows without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumers.engines.local.child.memory import free_of_gpu
from consumers.engines.local.cuda import kernels_environment, uses_cuda

GIB = 2**30


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of MLX's package for CUDA, without the package."""
    folder = tmp_path / "mlx_cuda_13-0.32.4.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.32.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)


@pytest.mark.usefixtures("installed")
def test_compiled_kernels_are_kept_in_the_user_s_cache_folder_for_each_version():
    assert uses_cuda()
    folder = kernels_environment()["MLX_PTX_CACHE_DIR"]
    assert folder.endswith("/headrace/kernels/0.32.4")


@pytest.mark.usefixtures("installed")
def test_a_folder_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/kernels")
    assert kernels_environment() == {}


def test_without_the_package_nothing_is_set():
    if uses_cuda():
        pytest.skip("MLX's build for CUDA is installed")
    assert kernels_environment() == {}


def test_cuda_names_the_memory_that_no_process_has():
    known = {"total_memory": 140 * GIB, "free_memory": 100 * GIB, "device_name": "a GPU"}
    assert free_of_gpu(known, active=4 * GIB, unused=GIB) == 101 * GIB


def test_metal_names_the_memory_that_one_process_should_use():
    known = {"memory_size": 64 * GIB, "max_recommended_working_set_size": 48 * GIB}
    assert free_of_gpu(known, active=4 * GIB, unused=GIB) == 44 * GIB
    assert free_of_gpu({"memory_size": 64 * GIB}, active=4 * GIB, unused=GIB) == 60 * GIB


def test_a_gpu_of_which_nothing_is_known_has_no_limit():
    assert free_of_gpu({"device_name": "a GPU"}, active=4 * GIB, unused=GIB) == 0
