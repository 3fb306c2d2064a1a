"""Resumable state in object storage: safetensors only, independent of world size and ZeRO stage.

`checkpoints/step-00000020.000003/` (the step, and the epoch of the writer's lease) holds files of each rank with the
parameter ranges that it owned (fp32 weights and Adam moments), the metrics log of all steps so far, and a manifest,
written last, that maps ranges to files. Nothing else is state: data order, dropout and augmentation are functions of
seed and position, and frozen weights come from the base model.

A checkpoint is saved while training goes on, in phases; docs/checkpoints.md says what a crash in each leaves.

    snapshot     every rank copies its share to host memory; training stands still
    storing      every rank stores its files in the background
    committing   all ranks have stored theirs; rank 0 writes the manifest, checks it, and prunes, in the background
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from internvl_api.status import CheckpointStatus

from internvl_trainer.artifacts.manifest import (
    Manifest,
    ManifestError,
    ManifestFile,
    check_sizes,
    commit,
    discard,
    fetch_files,
    read_manifest,
)
from internvl_trainer.artifacts.output_layout import (
    JOURNAL,
    checkpoint_folder,
    checkpoint_folders,
    kept_checkpoints,
    stored_checkpoints,
)
from internvl_trainer.artifacts.storage import Storage, persistently
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.base_identity import compare_bases
from internvl_trainer.train.background import Start, in_background
from internvl_trainer.train.host_share import HostShare
from internvl_trainer.train.in_flight import InFlight, Saved
from internvl_trainer.train.optimizer_shards import (
    KINDS,
    WEIGHT,
    local_fragments,
    set_optimizer_step,
    trainable_shapes,
    use_restored_weights,
)
from internvl_trainer.train.share_files import Stored, load_share, store_file, store_share

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, at most one of them in flight. All ranks call every method together but `ready`.

    Args:
        base: describe_base of the base model, which has the weights that a checkpoint leaves out.
        keep_best: whether to keep also the best step of each kept checkpoint.
        epoch: of the output's lease, which rank 0 holds; None without one.
        processes: ranks in this pod.
        start: how the work in the background is done.
    """

    def __init__(
        self,
        storage: Storage,
        group: Group,
        *,
        fingerprint: str,
        keep: int,
        keep_best: bool = False,
        base: dict[str, Any] | None = None,
        epoch: int | None = None,
        processes: int = 1,
        start: Start[Any] = in_background,
    ) -> None:
        self._storage, self._group, self._fingerprint, self._keep = storage, group, fingerprint, keep
        self._base, self._processes, self._start, self._keep_best = base, processes, start, keep_best
        self.epoch = epoch
        self._share: HostShare | None = None
        self._stored_before: list[str] | None = None
        self.in_flight: InFlight | None = None
        self.newest: CheckpointStatus | None = None
        self.saved: Saved | None = None

    def save(
        self,
        engine: Any,
        step: int,
        log: dict[str, Path],
        *,
        kinds: Sequence[str] = KINDS,
        best: int | None = None,
        is_last: bool = False,
    ) -> None:
        """Begin to store the state after `step` steps; returns after the snapshot. Waits for the one in flight.

        Each rank writes what it owns; rank 0 adds the files of the metrics log and, after all are done, the manifest.

        Args:
            kinds: weights alone suffice after the last step.
            best: the step with the lowest loss on data.validation so far.
            is_last: whether no step follows.
        """
        self.finish()
        folder = checkpoint_folder(step, self.epoch)
        self._make_room(folder)
        began = time.monotonic()
        share = self._host_share(engine, kinds)
        share.take(kinds)
        copied = _copy_of(log)
        flight = InFlight(
            step, folder, best, is_last, trainable_shapes(engine), tuple(kinds), share.bytes_of(kinds), began, Future()
        )
        flight.storing = self._start(lambda: self._store(flight, share, copied))
        self.in_flight = flight

    def ready(self) -> float:
        """This rank's term of the sum that `advance` gets; the next phase begins when the sum is the number of ranks.

        Every rank counts 1 when its files are stored; rank 0 then counts for all when the manifest is written. Raises
        the background's error.
        """
        flight = self.in_flight
        if flight is None:
            return 0.0
        if not flight.is_stored:
            return float(_is_done(flight.storing))
        return float(self._group.world_size * _is_done(flight.committing)) if flight.committing else 0.0

    def advance(self, ready: float) -> Saved | None:
        """Go to the next phase if all ranks are ready for it; the figures when the checkpoint is complete now.

        Args:
            ready: the sum of `ready` over all ranks.
        """
        return self._advance() if self.in_flight and ready >= self._group.world_size else None

    def finish(self) -> Saved | None:
        """Wait until the checkpoint in flight is complete; its figures. Raises the background's error."""
        saved = None
        while (flight := self.in_flight) is not None:
            if not flight.is_stored:
                flight.storing.result()
            elif flight.committing is not None:
                flight.committing.result()
            saved = self._advance()
        return saved

    def release(self) -> None:
        """Free the share in host memory; the next checkpoint makes it anew."""
        self._share = None

    def restore(self, engine: Any, scratch: Path, *, total_steps: int | None = None) -> int:
        """Load the newest intact checkpoint; its step, or 0 when there is none.

        `scratch`/journal receives the metrics log, on rank 0. A broken checkpoint is skipped with a
        warning that names it. The engine is changed only after every rank has read and checked its share.

        Args:
            total_steps: of the run; a checkpoint without the optimizer's state counts only at this step, or where
                training ended early.
        """
        for folder in self._group.first(stored_checkpoints(self._storage) if self._group.leads else None):
            if (step := self._restore_one(engine, folder, scratch, total_steps)) is not None:
                return step
        return 0

    def use_weights(self, engine: Any, step: int) -> bool:
        """Put the weights after `step` steps into the engine; False, with the engine unchanged, when no copy is whole.

        The optimizer's state stays that of the last step, so no step may follow. Not while a checkpoint is in flight.
        """
        found = stored_checkpoints(self._storage, step) if self._group.leads else None
        return any(self._use_one(engine, folder) for folder in self._group.first(found))

    def _use_one(self, engine: Any, folder: str) -> bool:
        share, is_read = self._host_share(engine, (WEIGHT,)), False
        try:
            manifest = self._read_manifest(engine, folder)
            load_share(self._storage, folder, manifest, share, (WEIGHT,))
            is_read = True
        except ManifestError as error:
            logger.warning("checkpoint %s is broken and its weights are not used: %s", folder, error)
        if self._group.any(not is_read):
            return False
        share.put((WEIGHT,))
        use_restored_weights(engine)
        self._group.barrier()
        return True

    def _host_share(self, engine: Any, kinds: Sequence[str]) -> HostShare:
        """The buffer for these kinds; made once, and again only for more kinds."""
        if self._share is None or not {*kinds} <= {*self._share.kinds}:
            self._share = None
            self._group.barrier()  # every process of the pod looks at the free memory before any takes some
            self._share = HostShare(
                local_fragments(engine, self._group.rank),
                kinds,
                pinned=self._group.device.type == "cuda",
                processes=self._processes,
            )
        return self._share

    def _make_room(self, folder: str) -> None:
        """Delete what killed attempts left, at the first call, and what is stored under this name."""
        if self._stored_before is None:
            self._stored_before = self._group.first(
                persistently(self._drop_partial)(folder) if self._group.leads else None
            )
        elif folder in self._stored_before:
            if self._group.leads:
                persistently(discard)(self._storage, folder)
            self._group.barrier()

    def _store(self, flight: InFlight, share: HostShare, log: tempfile.TemporaryDirectory[str]) -> Stored:
        def tell(sent: int) -> None:
            flight.sent = sent

        stored = store_share(self._storage, flight.folder, self._group.rank, share, flight.kinds, tell)
        with log:
            if self._group.leads:
                paths = sorted(path for path in Path(log.name).rglob("*") if path.is_file())
                names = {f"{JOURNAL}/{path.relative_to(log.name).as_posix()}": path for path in paths}
                stored.files.extend(store_file(self._storage, flight.folder, *item) for item in names.items())
        flight.store_seconds = time.monotonic() - flight.began
        return stored

    def _advance(self) -> Saved | None:
        """Do the next phase of the checkpoint in flight. Returns its figures after the last phase, else None."""
        flight = self.in_flight
        assert flight is not None
        if not flight.is_stored:
            stored = flight.storing.result()
            share = {"files": [asdict(file) for file in stored.files], "layout": stored.layout}
            shares = self._group.gather(share)
            flight.is_stored = True
            if self._group.leads:
                flight.committing = self._start(lambda: persistently(self._commit)(flight, shares))
            return None
        size = 0
        if flight.committing is not None:
            manifest = flight.committing.result()
            self._note(flight.folder, manifest)
            size = manifest.size
        self._group.barrier()
        self.in_flight = None
        self.saved = Saved(flight.step, time.monotonic() - flight.began, flight.store_seconds, size)
        return self.saved

    def _commit(self, flight: InFlight, shares: list[dict[str, Any]]) -> Manifest:
        files = [ManifestFile(**file) for share in shares for file in share["files"]]
        manifest = commit(
            self._storage,
            flight.folder,
            files,
            self._fingerprint,
            step=flight.step,
            worldSize=self._group.world_size,
            shapes=flight.shapes,
            kinds=flight.kinds,
            layout={name: ranges for share in shares for name, ranges in share["layout"].items()},
            best=flight.best,
            isLast=flight.is_last,
            base=self._base,
            versions={name: version(name) for name in ("torch", "deepspeed", "transformers")},
        )
        check_sizes(self._storage, flight.folder, manifest)
        self._prune()
        return manifest

    def _note(self, folder: str, manifest: Manifest) -> None:
        self.newest = CheckpointStatus(
            step=manifest.extra["step"],
            uri=f"{self._storage.uri}/{folder}",
            sha256=manifest.sha256,
            verified_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _drop_partial(self, own: str) -> list[str]:
        """The folders that stay, after partial checkpoints of killed attempts and `own` are deleted to make room."""
        whole = stored_checkpoints(self._storage)
        for folder in checkpoint_folders(self._storage):
            if folder == own or folder not in whole:
                discard(self._storage, folder)
        return [folder for folder in whole if folder != own]

    def _prune(self) -> None:
        """Delete checkpoints older than the newest `keep` but for the best, and partial ones of killed attempts."""
        kept = kept_checkpoints(self._storage, self._keep, with_best=self._keep_best)
        for folder in checkpoint_folders(self._storage):
            if folder not in kept and folder < kept[0]:
                discard(self._storage, folder)

    def _restore_one(self, engine: Any, folder: str, scratch: Path, total_steps: int | None) -> int | None:
        """Load the checkpoint in `folder`; its step, or None when it is broken for any rank."""
        manifest, share = None, self._host_share(engine, KINDS)
        try:
            manifest = self._read(engine, folder, share, scratch, total_steps)
        except ManifestError as error:
            logger.warning("checkpoint %s is broken and skipped: %s", folder, error)
        if self._group.any(manifest is None) or manifest is None:
            shutil.rmtree(scratch / JOURNAL, ignore_errors=True)
            return None
        step: int = manifest.extra["step"]
        share.put(_kinds_of(manifest))
        set_optimizer_step(engine, step)
        use_restored_weights(engine)
        if self._group.leads:
            self._note(folder, manifest)
        self._group.barrier()
        return step

    def _read(self, engine: Any, folder: str, share: HostShare, scratch: Path, total_steps: int | None) -> Manifest:
        """Read and check the files that this rank needs; together the ranks check every file."""
        manifest = self._read_manifest(engine, folder)
        is_last = manifest.extra.get("isLast") or manifest.extra["step"] == total_steps  # older ones do not record it
        if _kinds_of(manifest) == (WEIGHT,) and not is_last:
            raise ManifestError("CheckpointBroken", f"{folder} has no optimizer state, and steps are left to take")
        load_share(self._storage, folder, manifest, share, _kinds_of(manifest))
        if self._group.leads:
            shutil.rmtree(scratch / JOURNAL, ignore_errors=True)
            scratch.mkdir(parents=True, exist_ok=True)
            fetch_files(self._storage, folder, manifest.named(f"{JOURNAL}/"), scratch)
        return manifest

    def _read_manifest(self, engine: Any, folder: str) -> Manifest:
        """The manifest of a checkpoint of this run whose files are all there. Raises ManifestError and UserError."""
        manifest = read_manifest(self._storage, folder)
        if manifest is None:
            raise ManifestError("CheckpointBroken", f"{folder} lost its manifest")
        self._check(manifest, folder, trainable_shapes(engine))
        check_sizes(self._storage, folder, manifest)
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


def _kinds_of(manifest: Manifest) -> tuple[str, ...]:
    """The tensors stored for each parameter; older checkpoints do not record them and have all."""
    return tuple(manifest.extra.get("kinds", KINDS))


def _is_done(future: Future[Any]) -> bool:
    """Whether work is done. Raises its error."""
    if future.done():
        future.result()
    return future.done()


def _copy_of(log: dict[str, Path]) -> tempfile.TemporaryDirectory[str]:
    """A copy of the metrics log as it is now; later steps go on writing to it."""
    folder = tempfile.TemporaryDirectory(prefix="journal-")
    for name, path in log.items():
        copied = Path(folder.name) / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    return folder
