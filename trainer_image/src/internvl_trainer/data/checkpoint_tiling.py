"""Tile settings in a checkpoint's config.json, and a run's configuration completed from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from internvl_api.models.catalogue import find_model
from internvl_api.run_config import RunConfig
from internvl_api.spec import Image
from pydantic import ValidationError

from internvl_trainer.artifacts.fingerprint import identity
from internvl_trainer.artifacts.output_layout import RUN_FILE
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError
from internvl_trainer.json_text import parse_json

from .tiling import MOST_TILES

FIELDS = {
    "dynamic_image_size": "dynamic",
    "min_dynamic_patch": "min_dynamic_patch",
    "max_dynamic_patch": "max_dynamic_patch",
    "use_thumbnail": "thumbnail",
}
"""Field of upstream's config.json to attribute of the spec's section image."""
_SWITCHES = ("dynamic", "thumbnail")
_CONFIG = "config.json"


def follow_checkpoint(config: RunConfig, storage: Storage) -> RunConfig:
    """The run with every tile setting: the spec's, else the checkpoint's, else the catalogue's.

    Every stage calls it first, so that its fingerprint and all that it writes have the values in use. Reads nothing for
    a run that sets all of them. When the checkpoint cannot be read, takes the values that run.json recorded when the
    run began.

    Args:
        storage: of the run's output.

    Raises:
        UserError: the checkpoint cannot be read, and run.json has no values.
    """
    unset = [name for name in FIELDS.values() if getattr(config.image, name) is None]
    if not unset or config.model.kind == "retrieval":
        return config
    try:
        directory = fetch_directory(config.model.source, field="spec.model.source", weights=False)
    except UserError:
        recorded = _read_record(config, storage)
        if recorded is None:
            raise
        stored = recorded
    else:
        stored = read_tiling(directory, unset)
    known = find_model(config.model.name) if config.model.name else None
    if known is not None:
        stored = {"max_dynamic_patch": known.max_dynamic_patch, **stored}
    image = config.image.model_copy(update={name: stored.get(name) for name in unset})
    tiling = image.tiling
    if tiling.min_tiles > tiling.max_tiles:
        raise UserError(
            "InvalidSpec",
            f"minDynamicPatch {tiling.min_tiles} exceeds maxDynamicPatch {tiling.max_tiles}, one of which comes from "
            "the checkpoint's config.json; set both",
            "spec.image",
        )
    settled = dict(zip(FIELDS.values(), tiling, strict=True))
    return config.model_copy(update={"image": image.model_copy(update=settled)})


def _read_record(config: RunConfig, storage: Storage) -> dict[str, Any] | None:
    """The values of the run in this output, by attribute of Image; None without a run, or for another model."""
    try:
        begun = parse_json(storage.read(RUN_FILE))["identity"]
        if begun["model"]["source"] != identity(config)["model"]["source"]:
            return None
        tiling = Image.model_validate(begun["image"]).tiling
    except (UserError, LookupError, TypeError, ValidationError):
        return None
    return dict(zip(FIELDS.values(), tiling, strict=True))


def read_tiling(directory: Path, names: Collection[str] = tuple(FIELDS.values())) -> dict[str, Any]:
    """The settings in the config.json of a checkpoint's directory: those in `names`, by attribute of Image.

    Raises UserError for a file or a value that cannot be used.
    """
    path = config_path(directory)
    return tiling_of(read_config(path), str(path), names)


def tiling_of(stored: Mapping[str, Any], place: str, names: Collection[str] = tuple(FIELDS.values())) -> dict[str, Any]:
    """The same from the object in a config.json; `place`: its name in errors."""
    found = {}
    for key, name in FIELDS.items():
        value = stored.get(key)
        if name not in names or value is None:
            continue
        if not _is_valid(name, value):
            expected = "true or false" if name in _SWITCHES else f"a whole number from 1 to {MOST_TILES}"
            field = Image.model_fields[name].alias or name
            message = f"{key} is {value!r}, expected {expected}; correct the file, or set spec.image.{field}"
            raise UserError("InvalidConfig", message, place)
        found[name] = value
    return found


def config_path(directory: Path) -> Path:
    """The upstream config.json of a checkpoint: a directory in transformers' format keeps it in a folder of its own."""
    kept = directory / "upstream" / _CONFIG
    return kept if kept.exists() else directory / _CONFIG


def read_config(path: Path) -> Mapping[str, Any]:
    """The object in config.json. Raises UserError for a file that is missing or broken."""
    try:
        document = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise UserError("FileMissing", f"{_CONFIG} is missing; give a checkpoint's directory", str(path)) from error
    return document if isinstance(document, dict) else {}


def _is_valid(name: str, value: Any) -> bool:
    if name in _SWITCHES:
        return isinstance(value, bool)
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TILES
