"""The versions of a run's annotation files: texts that change with a file's content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.fingerprint import uses_held_out
from internvl_trainer.artifacts.shards import list_shards
from internvl_trainer.artifacts.sources import describe_file, fetch_file, meta_path
from internvl_trainer.artifacts.storage import sha256_of
from internvl_trainer.errors import UserError
from internvl_trainer.json_text import parse_json

TRAINING, VALIDATION, TASKS = "data.train", "data.validation", "evaluation.tasks"
_META, _VALIDATION_META = "data.meta", "data.validationMeta"

Versions = dict[str, str]
"""`field of the spec (URI)` to the version of the file that it names."""


def describe_inputs(config: RunConfig) -> Versions:
    """The version of every annotation file of each field whose files can all be reached.

    Files that are gone are left out: the stage that reads them reports that, and a finished stage no longer needs them.
    """
    versions: Versions = {}
    for field, uri in _annotations(config):
        try:
            versions |= {
                f"{field} ({shard.partition('?')[0]})": describe_file(shard, _digest, field=f"spec.{field}")
                for shard in list_shards(uri, field=f"spec.{field}")
            }
        except UserError:
            continue
    return versions


def first_changed(recorded: Mapping[str, str], found: Mapping[str, str], *prefixes: str) -> str | None:
    """The first file, as `field (URI)`, whose recorded and found versions differ; prefixes limit the fields.

    A file that came or went differs too, where its field has others in both: it is a shard.
    """
    fields = set(map(_field_of, recorded)) & set(map(_field_of, found))
    names = sorted(name for name in {*recorded, *found} if name.startswith(prefixes or ("",)))
    return next((n for n in names if _field_of(n) in fields and recorded.get(n) != found.get(n)), None)


def _field_of(name: str) -> str:
    return name.partition(" (")[0]


def training_prefixes(config: RunConfig) -> tuple[str, ...]:
    """Prefixes of the files that decide the loss curve and the step that is exported."""
    return (TRAINING, _META, VALIDATION, _VALIDATION_META) if uses_held_out(config) else (TRAINING, _META)


def _annotations(config: RunConfig) -> Iterator[tuple[str, str]]:
    for section, datasets in ((TRAINING, config.data.train), (VALIDATION, config.data.validation)):
        for name, dataset in datasets.items():
            yield f"{section}.{name}.annotation", dataset.annotation
            if dataset.questions:
                yield f"{section}.{name}.questions", dataset.questions
    for name, task in config.evaluation.tasks.items():
        yield f"{TASKS}.{name}.annotation", task.annotation
    data = config.data
    for section, meta in ((_META, data.meta), (_VALIDATION_META, data.validation_meta)):
        if meta:
            yield section, meta
            yield from _listed_in(meta, data.meta_root, section)


def _listed_in(uri: str, root: str | None, section: str) -> Iterator[tuple[str, str]]:
    """The annotations of a meta JSON; nothing for one that cannot be read, which the stage reports."""
    try:
        meta = parse_json(fetch_file(uri, field=f"spec.{section}").read_text(encoding="utf-8-sig"))
    except (UserError, UnicodeDecodeError):
        return
    for name, entry in meta.items() if isinstance(meta, dict) else ():
        annotation = entry.get("annotation") if isinstance(entry, dict) else None
        if isinstance(annotation, str):
            yield f"{section}.{name}", meta_path(annotation, uri, root)


def digest_of_file(path: Path) -> str:
    """The sha256 of a file in hex, read once by each process until the file changes."""
    status = path.stat()
    return _digest_of_state(path, status.st_size, status.st_mtime_ns)


def _digest(path: Path) -> str:
    return f"sha256 {digest_of_file(path)}"


@lru_cache(maxsize=1024)
def _digest_of_state(path: Path, _size: int, _modified: int) -> str:
    return sha256_of(path)
