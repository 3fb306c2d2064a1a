"""Stores the exported weights, each file while the next one is collected."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from pathlib import Path

from internvl_trainer.artifacts.fenced_storage import check_epoch
from internvl_trainer.artifacts.manifest import ManifestFile
from internvl_trainer.artifacts.storage import persistently
from internvl_trainer.run_context import GroupContext
from internvl_trainer.train.background import in_background
from internvl_trainer.train.setup import TrainingSetup


def store_export(
    context: GroupContext, setup: TrainingSetup, directory: Path, kind: str, epoch: int | None
) -> list[ManifestFile]:
    """Store the files that this rank exports, below `kind` (adapter or model). All ranks call it.

    `directory` holds two files at a time. Raises LeaseLost when the output's lease is no longer the one of `epoch`.
    """
    stored: list[ManifestFile] = []
    sending: Future[list[ManifestFile]] | None = None
    for path in setup.components.export(setup.engine, directory):
        stored += sending.result() if sending else []
        name = f"{kind}/{path.relative_to(directory).as_posix()}"
        sending = in_background(partial(_send, context, name, path, epoch))
    return stored + (sending.result() if sending else [])


def _send(context: GroupContext, name: str, path: Path, epoch: int | None) -> list[ManifestFile]:
    if not context.group.leads:
        check_epoch(context.storage, epoch)
    stored = persistently(context.stages.upload)("train", {name: path})
    path.unlink()
    return stored
