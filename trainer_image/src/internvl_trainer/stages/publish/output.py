"""The publish stage: what the other stages made, checked, with its record, under artifacts/; then on the Hub.

The manifest of artifacts/ comes last. A second attempt keeps every file that an earlier one brought whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.artifacts.disk_space import scratch_folder
from internvl_trainer.artifacts.fingerprint import claim_output, fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import MANIFEST, Manifest, ManifestError, commit, read_manifest
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import Rejected
from internvl_trainer.metrics import Reporter
from internvl_trainer.stages.publish.collect import (
    EVALUATION,
    MODEL_FOLDERS,
    PREFLIGHT,
    REPORT,
    RUN_CONFIG,
    Item,
    Manifests,
    finished_stages,
    recorded_items,
    stored_items,
)
from internvl_trainer.stages.publish.hub_upload import publish_to_hub
from internvl_trainer.train.metrics_log import EVENTS_FOLDER, METRICS_FILE

FOLDER = "artifacts"
_REPORT_BYTES = 64 << 20  # with room to spare: a page and a dozen pictures
_PARALLEL_FILES = 4  # each is itself sent or copied in parallel parts


def publish(config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    """Bring artifacts/ about, then the Hub's repository. What is there already, whole, is not sent again."""
    made = finished_stages(config, storage)
    refuse_below_threshold(config, storage)
    reporter.doing("looking for what is published already")
    manifest = find_published(config, storage, made) or fill_output(config, storage, made, reporter)
    artifacts = name_artifacts(storage, manifest)
    if config.publish.hub:
        artifacts["hub"] = publish_to_hub(config, config.publish.hub, storage, FOLDER, manifest, reporter.doing)
    commit(storage, stage_folder("publish"), [], fingerprint(config, "publish"), artifacts=artifacts)
    also = f", and {artifacts['hub']}" if "hub" in artifacts else ""
    return StageResult(
        stage="publish",
        outcome="succeeded",
        reason="Published",
        message=f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB in {storage.uri}/{FOLDER}{also}",
        artifacts=artifacts,
    )


def refuse_below_threshold(config: RunConfig, storage: Storage) -> None:
    """Raises Rejected when the figures do not meet publishIf: whoever starts this stage by hand gets no further."""
    if not config.evaluation.publish_if:
        return
    from internvl_trainer.stages.pipeline import find_done
    from internvl_trainer.stages.publish_condition import check_gate  # imports PyTorch

    try:
        if evaluated := find_done("evaluate", config, storage):
            check_gate(config, storage, evaluated)
    except Rejected as error:
        raise Rejected(error.result.model_copy(update={"stage": "publish"})) from error


def find_published(config: RunConfig, storage: Storage, made: Manifests) -> Manifest | None:
    """The manifest of artifacts/ when it is of just these stages and all its files are there, else None."""
    try:
        manifest = read_manifest(storage, FOLDER)
    except ManifestError:
        return None
    if manifest is None or manifest.fingerprint != fingerprint(config, "publish"):
        return None
    origins = {item.file.path: str(item.origin) for item in stored_items(made)}

    def is_there(path: str, size: int, sha256: str) -> bool:
        return storage.has_content(f"{FOLDER}/{path}", size, sha256, like=origins.get(path))

    if manifest.extra.get("stages") != _digests(made):
        return None
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        found = pool.map(lambda file: is_there(file.path, file.size, file.sha256), manifest.files)
        return manifest if all(found) else None


def fill_output(config: RunConfig, storage: Storage, made: Manifests, reporter: Reporter) -> Manifest:
    """Files first, manifest last; an older manifest goes before anything under it changes."""
    storage.delete(f"{FOLDER}/{MANIFEST}")
    storage.drop_unfinished(f"{FOLDER}/")
    reporter.doing("writing the report")
    with scratch_folder(_REPORT_BYTES, "the report") as scratch:
        items = [*stored_items(made), *recorded_items(config, storage, made, scratch)]
        _delete_others(storage, {item.file.path for item in items})
        reporter.doing("copying and checking every file")
        bring(storage, items, lambda text: reporter.update(detail=text))  # seen, but not a line of the log a file
    claim_output(storage, config)
    files = [item.file for item in items]
    kind = made["train"].extra["kind"]
    return commit(storage, FOLDER, files, fingerprint(config, "publish"), kind=kind, stages=_digests(made))


def bring(storage: Storage, items: Sequence[Item], tell: Callable[[str], object]) -> None:
    """Copy or send what is not there yet, several files at a time, and check each.

    Raises ManifestError for a file that is not what its stage's manifest says.
    """
    total = sum(item.file.size for item in items)
    lock, done = threading.Lock(), [0, 0]

    def bring_one(item: Item) -> None:
        if not _is_there(storage, item):
            _send(storage, item)
            if not _is_there(storage, item):
                raise ManifestError(
                    "ArtifactBroken",
                    f"{storage.uri}/{FOLDER}/{item.file.path} has not the sha256 {item.file.sha256} and "
                    f"{item.file.size} bytes of {_shown(storage, item.origin)}; nothing of it is published. Delete "
                    "the folder of that stage and start it again",
                )
        with lock:
            done[0], done[1] = done[0] + 1, done[1] + item.file.size
            tell(f"{done[0]} of {len(items)} files are there, {done[1] / 1e6:.1f} of {total / 1e6:.1f} MB")

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(bring_one, items))


def name_artifacts(storage: Storage, manifest: Manifest) -> dict[str, str]:
    """What a user looks for, by name, to its URI."""
    places = {
        "adapter": "adapter/",
        "model": MODEL_FOLDERS["upstream"],
        "modelHf": MODEL_FOLDERS["hf"],
        "evaluation": EVALUATION,
        "report": f"{REPORT}/index.html",
        "tensorboard": f"{EVENTS_FOLDER}/",
        "runConfig": RUN_CONFIG,
        "preflight": PREFLIGHT,
        "metrics": METRICS_FILE,
    }
    present = {name: place.rstrip("/") for name, place in places.items() if manifest.named(place)}
    return {name: f"{storage.uri}/{FOLDER}/{place}" for name, place in present.items()}


def _is_there(storage: Storage, item: Item) -> bool:
    like = item.origin if isinstance(item.origin, str) else None
    return storage.has_content(f"{FOLDER}/{item.file.path}", item.file.size, item.file.sha256, like=like)


def _send(storage: Storage, item: Item) -> None:
    key = f"{FOLDER}/{item.file.path}"
    if isinstance(item.origin, Path):
        storage.upload(item.origin, key, sha256=item.file.sha256)
    else:
        storage.copy(item.origin, key)


def _delete_others(storage: Storage, names: set[str]) -> None:
    """What a run with other settings published here before."""
    for stored in list(storage.list(f"{FOLDER}/")):
        if stored.key.removeprefix(f"{FOLDER}/") not in names:
            storage.delete(stored.key)


def _digests(made: Manifests) -> dict[str, str]:
    return {stage: manifest.sha256 for stage, manifest in made.items()}


def _shown(storage: Storage, origin: str | Path) -> str:
    return f"{storage.uri}/{origin}" if isinstance(origin, str) else str(origin)
