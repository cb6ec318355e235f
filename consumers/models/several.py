"""The models that the settings name for one worker: the default one, further ones, and those in folders of models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from consumers.models.names import is_folder, located, served_name_of
from pipeline.config import Config, ConfigError, ModelEntry
from pipeline.core.models import is_internal, same_model

_CONFIG = "config.json"
# A request for it is answered by any model.
_ANY = "auto"


class WantedModel(NamedTuple):
    """A model that the settings name.

    Attributes:
        name: on the wire.
        place: as the setting `model` takes it.
        entry: its own settings.
    """

    name: str
    place: str
    entry: ModelEntry


def config_of(model: WantedModel, config: Config) -> Config:
    """The settings with which `obtain` gets a model."""
    return msgspec.structs.replace(config, model=model.place)


def draft_config_of(model: WantedModel, config: Config) -> Config | None:
    """The settings with which `obtain` gets the draft model of a model; None if it has none."""
    place = model.entry.over(config).draft_model
    return msgspec.structs.replace(config, model=place) if place else None


def fetched_model(name: str) -> WantedModel:
    """A model that no settings name: it was fetched for the worker."""
    return WantedModel(name, name, _without_others(ModelEntry()))


def wanted_models(config: Config) -> list[WantedModel]:
    """The models of the settings, the default one first.

    Raises:
        ConfigError: two of them have one name, as requests are matched with names; a name cannot be requested; or the
            default one is internal.
    """
    found: dict[str, WantedModel] = {}
    for model in _named(config):
        for name in (model.name, *model.entry.aliases, *model.entry.over(config).adapters):
            if same_model(name, _ANY):
                raise ConfigError(f'"{name}" stands for any model and cannot be the name of {model.place}. Rename it.')
            other = next((other for known, other in found.items() if same_model(known, name)), model)
            if (other.name, other.place) != (model.name, model.place):
                both = f"{_shown(other)} and {_shown(model)}"
                raise ConfigError(f'Two models have the name "{name}": {both}. Rename one.')
            found.setdefault(name, model)
    models = list({model.name: model for model in found.values()}.values())
    if is_internal(models[0].name, config.internal_models):
        what = f"Model {_shown(models[0])} is internal and answers no request."
        raise ConfigError(f"{what} Name another one first, or change internal_models.")
    return models


def _shown(model: WantedModel) -> str:
    return model.place if model.name == model.place else f"{model.name} ({model.place})"


def _named(config: Config) -> Iterator[WantedModel]:
    tables = dict(config.models)
    yield from _expanded(config.model, tables.pop(config.model, ModelEntry()))
    for name, entry in tables.items():
        yield from _expanded(name, _without_others(entry))


def _without_others(entry: ModelEntry) -> ModelEntry:
    """The settings of a further model: the adapters and the draft model of the default one do not fit it."""
    return msgspec.structs.replace(
        entry,
        adapter_path=entry.adapter_path or "",
        adapters=entry.adapters or {},
        draft_model=entry.draft_model or "",
    )


def _expanded(name: str, entry: ModelEntry) -> Iterator[WantedModel]:
    """The model, or those in a folder of models, which have the names of their folders."""
    place = entry.path or name
    if is_folder(place):
        folder = Path(located(place))
        inner = sorted(file.parent for file in folder.glob(f"*/{_CONFIG}"))
        if inner and not (folder / _CONFIG).exists():
            yield from (WantedModel(each.name, str(each), entry) for each in inner)
            return
    yield WantedModel(name if entry.path else served_name_of(place), place, entry)
