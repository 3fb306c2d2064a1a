"""Publish to artifacts/: the stages' verified files and the run's record, then the manifest.

A second attempt keeps every file that an earlier one stored whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvl_trainer.artifacts.disk_space import scratch_folder
from internvl_trainer.artifacts.manifest import MANIFEST, Manifest, ManifestError, commit, read_manifest
from internvl_trainer.artifacts.output_layout import (
    ARTIFACTS,
    EVALUATION,
    EVENTS_FOLDER,
    METRICS_FILE,
    MODEL_FOLDERS,
    PREFLIGHT,
    REPORT,
    REPORT_PAGE,
    RUN_CONFIG,
    SERVE,
)
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.run_context import RunContext
from internvl_trainer.stage_store import StageStore
from internvl_trainer.stages.publish.collect import Item, Manifests, recorded_items, stored_items

_REPORT_BYTES = 64 << 20  # more than a page and a dozen pictures take
_PARALLEL_FILES = 4  # each is itself sent or copied in parallel parts


def find_published(stages: StageStore, made: Manifests) -> Manifest | None:
    """The manifest of artifacts/ when it is of exactly these stages and all its files are intact, else None."""
    storage = stages.storage
    try:
        manifest = read_manifest(storage, ARTIFACTS)
    except ManifestError:
        return None
    if manifest is None or manifest.fingerprint != stages.fingerprint("publish"):
        return None
    origins = {item.file.path: str(item.origin) for item in stored_items(stages, made)}

    def is_there(path: str, size: int, sha256: str) -> bool:
        return storage.has_content(f"{ARTIFACTS}/{path}", size, sha256, like=origins.get(path))

    if manifest.extra.get("stages") != _digests(made):
        return None
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        found = pool.map(lambda file: is_there(file.path, file.size, file.sha256), manifest.files)
        return manifest if all(found) else None


def fill_output(context: RunContext, made: Manifests) -> Manifest:
    """Store the files, then the manifest; delete an older manifest before any file under it changes."""
    stages, storage, reporter = context.stages, context.storage, context.reporter
    storage.delete(f"{ARTIFACTS}/{MANIFEST}")
    storage.drop_unfinished(f"{ARTIFACTS}/")
    reporter.doing("writing the report")
    with scratch_folder(_REPORT_BYTES, "the report") as scratch:
        stored = stored_items(stages, made)
        items = [*stored, *recorded_items(stages, made, scratch, stored)]
        _delete_others(storage, {item.file.path for item in items})
        reporter.doing("copying and checking every file")
        store_items(storage, items, lambda text: reporter.update(detail=text))  # not one log line a file
    stages.claim_output()
    files = [item.file for item in items]
    trained = made["train"].extra if "train" in made else {}
    about = {name: trained[name] for name in ("kind", "steps", "exported", "endedEarly") if trained.get(name)}
    return commit(storage, ARTIFACTS, files, stages.fingerprint("publish"), **about, stages=_digests(made))


def store_items(storage: Storage, items: Sequence[Item], tell: Callable[[str], object]) -> None:
    """Copy or send what is not there yet, several files at a time, and check each.

    Raises ManifestError for a file that is not what its stage's manifest says.
    """
    total = sum(item.file.size for item in items)
    lock, done = threading.Lock(), [0, 0]

    def store_one(item: Item) -> None:
        if not _is_there(storage, item):
            _send(storage, item)
            if not _is_there(storage, item):
                raise ManifestError(
                    "ArtifactBroken",
                    f"{storage.uri}/{ARTIFACTS}/{item.file.path} has not the sha256 {item.file.sha256} and "
                    f"{item.file.size} bytes of {_shown(storage, item.origin)}; nothing of it is published. Delete "
                    "the folder of that stage and start it again",
                )
        with lock:
            done[0], done[1] = done[0] + 1, done[1] + item.file.size
            tell(f"{done[0]} of {len(items)} files are there, {done[1] / 1e6:.1f} of {total / 1e6:.1f} MB")

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(store_one, items))


def name_artifacts(storage: Storage, manifest: Manifest) -> dict[str, str]:
    """The artifacts' names in the status, to their URIs."""
    places = {
        "adapter": "adapter/",
        "model": MODEL_FOLDERS["upstream"],
        "modelHf": MODEL_FOLDERS["hf"],
        "evaluation": EVALUATION,
        "report": f"{REPORT}/{REPORT_PAGE}",
        "tensorboard": f"{EVENTS_FOLDER}/",
        "runConfig": RUN_CONFIG,
        "serve": SERVE,
        "preflight": PREFLIGHT,
        "metrics": METRICS_FILE,
    }
    present = {name: place.rstrip("/") for name, place in places.items() if manifest.named(place)}
    return {name: f"{storage.uri}/{ARTIFACTS}/{place}" for name, place in present.items()}


def _is_there(storage: Storage, item: Item) -> bool:
    like = item.origin if isinstance(item.origin, str) else None
    return storage.has_content(f"{ARTIFACTS}/{item.file.path}", item.file.size, item.file.sha256, like=like)


def _send(storage: Storage, item: Item) -> None:
    key = f"{ARTIFACTS}/{item.file.path}"
    if isinstance(item.origin, Path):
        storage.upload(item.origin, key, sha256=item.file.sha256)
    else:
        storage.copy(item.origin, key)


def _delete_others(storage: Storage, names: set[str]) -> None:
    """Delete files that a run with other settings published here before."""
    for stored in list(storage.list(f"{ARTIFACTS}/")):
        if stored.key.removeprefix(f"{ARTIFACTS}/") not in names:
            storage.delete(stored.key)


def _digests(made: Manifests) -> dict[str, str]:
    return {stage: manifest.sha256 for stage, manifest in made.items()}


def _shown(storage: Storage, origin: str | Path) -> str:
    return f"{storage.uri}/{origin}" if isinstance(origin, str) else str(origin)
