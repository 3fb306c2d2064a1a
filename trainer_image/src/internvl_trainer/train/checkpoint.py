"""Resumable state in object storage: safetensors only, independent of world size and ZeRO stage.

`checkpoints/step-00000020.000003/` (the step, and the epoch of the writer's lease) holds files of each rank with the
parameter ranges that it owned (fp32 weights and Adam moments), the metrics log of all steps so far, and a manifest,
written last, that maps ranges to files. Nothing else is state: data order, dropout and augmentation are functions of
seed and position, and frozen weights come from the base model.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from internvl_api.status import CheckpointStatus
from safetensors import safe_open
from safetensors.torch import save_file

from internvl_trainer.artifacts.manifest import (
    Manifest,
    ManifestError,
    ManifestFile,
    check_sizes,
    commit,
    discard,
    fetch_files,
    read_manifest,
    upload_files,
)
from internvl_trainer.artifacts.output_layout import (
    CHECKPOINT_KEY,
    CHECKPOINTS,
    JOURNAL,
    checkpoint_folder,
    stored_checkpoints,
)
from internvl_trainer.artifacts.storage import Storage, persistently
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.base_identity import compare_bases
from internvl_trainer.train.optimizer_shards import (
    KINDS,
    Fragment,
    local_fragments,
    set_optimizer_step,
    trainable_shapes,
    use_restored_weights,
)

logger = logging.getLogger(__name__)

_FILE_BYTES = 2 << 30  # held in memory and on the scratch disk at a time

# The parameter ranges in each file: file to parameter to [start, length].
Layout = dict[str, dict[str, list[int]]]


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together.

    Args:
        base: describe_base of the base model, which has the weights that a checkpoint leaves out.
        epoch: of the output's lease, which rank 0 holds; None without one.
    """

    def __init__(
        self,
        storage: Storage,
        group: Group,
        *,
        fingerprint: str,
        keep: int,
        base: dict[str, Any] | None = None,
        epoch: int | None = None,
    ) -> None:
        self._storage, self._group, self._fingerprint, self._keep = storage, group, fingerprint, keep
        self._base, self._epoch = base, epoch
        self.newest: CheckpointStatus | None = None
        self.newest_bytes = 0

    def save(self, engine: Any, step: int, log: dict[str, Path]) -> None:
        """Store the state after `step` steps; when this returns, the checkpoint is complete and verified.

        Each rank writes what it owns; rank 0 adds the files of the metrics log and, after all are done, the manifest.
        """
        folder = checkpoint_folder(step, self._epoch)
        if self._group.leads:
            persistently(self._drop_partial)(step, folder)
        self._group.barrier()
        files, layout = self._store_fragments(folder, local_fragments(engine, self._group.rank))
        if self._group.leads:
            files += self._upload(folder, {f"{JOURNAL}/{name}": path for name, path in log.items()})
        shares = self._group.gather({"files": [asdict(file) for file in files], "layout": layout})
        if self._group.leads:
            persistently(self._finish)(folder, step, shares, trainable_shapes(engine))
        self._group.barrier()

    def restore(self, engine: Any, scratch: Path) -> int:
        """Load the newest intact checkpoint; its step, or 0 when there is none.

        `scratch`/journal receives the metrics log, on rank 0. A broken checkpoint is skipped with a
        warning that names it.
        """
        for folder in self._group.first(stored_checkpoints(self._storage) if self._group.leads else None):
            if (step := self._restore_one(engine, folder, scratch)) is not None:
                return step
        return 0

    def _store_fragments(self, folder: str, fragments: list[Fragment]) -> tuple[list[ManifestFile], Layout]:
        files: list[ManifestFile] = []
        layout: Layout = {}
        for number, batch in enumerate(_batches(fragments)):
            name = f"rank-{self._group.rank:05d}-{number:03d}.safetensors"
            with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
                path = Path(scratch) / name
                save_file({f"{kind}/{part.name}": part.read(kind) for part in batch for kind in KINDS}, path)
                files += self._upload(folder, {name: path})
            layout[name] = {part.name: [part.start, part.length] for part in batch}
        return files, layout

    def _upload(self, folder: str, files: dict[str, Path]) -> list[ManifestFile]:
        return persistently(upload_files)(self._storage, folder, files)

    def _finish(self, folder: str, step: int, shares: list[dict[str, Any]], shapes: dict[str, list[int]]) -> None:
        files = [ManifestFile(**file) for share in shares for file in share["files"]]
        manifest = commit(
            self._storage,
            folder,
            files,
            self._fingerprint,
            step=step,
            worldSize=self._group.world_size,
            shapes=shapes,
            layout={name: ranges for share in shares for name, ranges in share["layout"].items()},
            base=self._base,
            versions={name: version(name) for name in ("torch", "deepspeed", "transformers")},
        )
        check_sizes(self._storage, folder, manifest)
        self._note(folder, manifest)
        self._prune()

    def _note(self, folder: str, manifest: Manifest) -> None:
        self.newest_bytes = manifest.size
        self.newest = CheckpointStatus(
            step=manifest.extra["step"],
            uri=f"{self._storage.uri}/{folder}",
            sha256=manifest.sha256,
            verified_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _drop_partial(self, step: int, own: str) -> None:
        """Delete partial checkpoints of this step, left by killed attempts: there may be no room for two."""
        found = self._folders(checkpoint_folder(step))
        whole = stored_checkpoints(self._storage)
        for folder in found:
            if folder == own or folder not in whole:
                discard(self._storage, folder)

    def _prune(self) -> None:
        """Delete checkpoints older than the newest `keep`, and partial ones of killed attempts."""
        kept = stored_checkpoints(self._storage)[: self._keep]
        for folder in self._folders(f"{CHECKPOINTS}/"):
            if folder not in kept and folder < kept[0]:
                discard(self._storage, folder)

    def _folders(self, prefix: str) -> list[str]:
        """Folders of checkpoints, partial ones too, whose name starts with `prefix`."""
        found = (CHECKPOINT_KEY.match(file.key) for file in self._storage.list(prefix))
        return sorted({match[0].rstrip("/") for match in found if match})

    def _restore_one(self, engine: Any, folder: str, scratch: Path) -> int | None:
        """Load the checkpoint in `folder`; its step, or None when it is broken for any rank."""
        manifest = None
        target = scratch / f"restore-{self._group.rank}"
        fragments = local_fragments(engine, self._group.rank)
        try:
            manifest = self._fetch(folder, fragments, trainable_shapes(engine), target)
        except ManifestError as error:
            logger.warning("checkpoint %s is broken and skipped: %s", folder, error)
        if self._group.sum([manifest is not None])[0] < self._group.world_size or manifest is None:
            shutil.rmtree(target, ignore_errors=True)
            return None
        step: int = manifest.extra["step"]
        _load(fragments, manifest.extra["layout"], target)
        set_optimizer_step(engine, step)
        use_restored_weights(engine)
        if self._group.leads:
            shutil.copytree(target / JOURNAL, scratch / JOURNAL, dirs_exist_ok=True)
            self._note(folder, manifest)
        shutil.rmtree(target)
        self._group.barrier()
        return step

    def _fetch(self, folder: str, fragments: list[Fragment], shapes: dict[str, list[int]], target: Path) -> Manifest:
        """Download and check the files that this rank needs; together the ranks check every file."""
        manifest = read_manifest(self._storage, folder)
        if manifest is None:
            raise ManifestError("CheckpointBroken", f"{folder} lost its manifest")
        self._check(manifest, folder, shapes)
        check_sizes(self._storage, folder, manifest)
        wanted = {name for part in fragments for name, _, _ in _overlaps(part, manifest.extra["layout"])}
        files = [file for file in manifest.files if file.path in wanted]
        files += manifest.named(f"{JOURNAL}/") if self._group.leads else []
        target.mkdir(parents=True, exist_ok=True)
        fetch_files(self._storage, folder, files, target)
        return manifest

    def _check(self, manifest: Manifest, folder: str, shapes: dict[str, list[int]]) -> None:
        if manifest.fingerprint != self._fingerprint:
            raise UserError(
                "OutputHoldsAnotherRun",
                f"{self._storage.uri}/{folder} is a checkpoint of another run; choose another output, or delete it",
                "spec.output",
            )
        if manifest.extra["shapes"] != shapes:
            names = sorted({*manifest.extra["shapes"], *shapes})
            differs = next(name for name in names if manifest.extra["shapes"].get(name) != shapes.get(name))
            raise UserError(
                "CheckpointMismatch",
                f"{self._storage.uri}/{folder} has {differs} as {manifest.extra['shapes'].get(differs)}, the model as "
                f"{shapes.get(differs)}; was the base model changed in place? Choose another output",
                "spec.output",
            )
        if self._base and (recorded := manifest.extra.get("base")):  # older checkpoints do not record it
            compare_bases(recorded, self._base)


class Overlap(NamedTuple):
    """Elements [start, stop) of a flattened parameter, found in `file`, whose own range begins at `file_start`."""

    file: str
    file_start: int
    span: tuple[int, int]


def _overlaps(part: Fragment, layout: Layout) -> Iterator[Overlap]:
    """The pieces of stored files that make up a fragment; the files may come from another world size."""
    for file, ranges in layout.items():
        if part.name not in ranges:
            continue
        file_start, length = ranges[part.name]
        start, stop = max(part.start, file_start), min(part.start + part.length, file_start + length)
        if start < stop:
            yield Overlap(file, file_start, (start, stop))


def _load(fragments: list[Fragment], layout: Layout, folder: Path) -> None:
    with ExitStack() as stack:
        files = {path.name: stack.enter_context(safe_open(path, "pt")) for path in folder.glob("rank-*.safetensors")}
        for part in fragments:
            pieces = list(_overlaps(part, layout))
            for kind in KINDS:
                values = torch.empty(part.length, dtype=torch.float32)
                for file, file_start, (start, stop) in pieces:
                    stored = files[file].get_slice(f"{kind}/{part.name}")
                    values[start - part.start : stop - part.start] = stored[start - file_start : stop - file_start]
                part.write(kind, values)


def _batches(fragments: list[Fragment]) -> Iterator[list[Fragment]]:
    """Consecutive fragments of about _FILE_BYTES together; no batch is empty."""
    batch: list[Fragment] = []
    size = 0
    for fragment in fragments:
        batch.append(fragment)
        size += fragment.length * 4 * len(KINDS)
        if size >= _FILE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
