"""Merging a chat model: the base with what was trained, in each format asked for.

Tensors are read, changed and written one at a time, and the check computes one layer at a time, so that a model may be
larger than the machine's memory.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.artifacts.disk_space import check_space, naming_full_disk
from internvl_trainer.artifacts.manifest import Manifest, ManifestFile
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.data.reference_row import ReferenceRow, reference_row
from internvl_trainer.host_memory import give_memory_back
from internvl_trainer.model.base_identity import check_base
from internvl_trainer.model.checkpoint_format import Architecture
from internvl_trainer.model.checkpoint_source import Source, open_checkpoint
from internvl_trainer.model.convert_checkpoint import Edit, Format, write_checkpoint
from internvl_trainer.model.exported_config import trained_config
from internvl_trainer.model.streamed_logits import layerwise_logits
from internvl_trainer.model.tokenizer import load_tokenizer
from internvl_trainer.model.trained_weights import TrainedWeights, read_trained_weights
from internvl_trainer.model.verify_merge import find_wrong_tensor
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.merge.shared import MARGIN, check_failed, check_room, store_directory

logger = logging.getLogger(__name__)

FOLDERS: dict[Format, str] = {"upstream": "model", "hf": "model-hf"}
ARTIFACTS: dict[Format, str] = {"upstream": "model", "hf": "modelHf"}

# Norm of the logits' difference over their norm. Both sides compute in fp32, so what differs is the rounding of merged
# weights to their stored dtype (half a unit in the last place: 2^-24, 2^-11, 2^-8), amplified by the layers above.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_POSITIONS = 64  # at the end of the sequence, whose logits are compared


@dataclass(frozen=True)
class Work:
    """The input of every format.

    Attributes:
        directory: a checkpoint in either format.
        architecture: with the tile size of training.
        weights: what training learned beyond the checkpoint; None where that is a trained model itself.
    """

    directory: Path
    architecture: Architecture
    weights: TrainedWeights | None
    edit: Edit

    def source(self) -> Source:
        return open_checkpoint(self.directory)


@dataclass(frozen=True)
class Check:
    """How close a written model is to the adapter on its base: norms over the norm of the adapter's logits.

    Attributes:
        row: of the training data, file:line.
        positions: whose logits were compared.
        difference: of the written model's logits.
        moved: of the base model's, which says how much the adapter does; None without one.
    """

    row: str
    positions: int
    difference: float
    tolerance: float
    moved: float | None


def merge_chat_model(context: RunContext) -> StageResult:
    """Write, check and store each format; the manifest last. Raises UserError for what the user must correct."""
    give_memory_back()
    config, stages, reporter = context.config, context.stages, context.reporter
    trained = stages.require("train")
    reporter.doing("looking for what was trained")
    stages.discard("merge")  # left by a killed attempt
    with tempfile.TemporaryDirectory(prefix="merge-") as scratch:
        work = _prepare(context, trained, Path(scratch))
        row = reference_row(config, context.storage, work.architecture, load_tokenizer(work.directory))
        formats = _formats(config, work)
        needed = check_room(context.storage, work.source(), Path(scratch), len(formats))
        files: list[ManifestFile] = []
        checks: dict[str, Check] = {}
        with naming_full_disk(Path(scratch).parent, needed, "a merged model"):
            for each in formats:
                target = Path(scratch) / FOLDERS[each]
                reporter.doing(f"writing {FOLDERS[each]}/")
                target.mkdir()
                write_checkpoint(work.source(), target, each, work.edit)
                reporter.doing(f"checking {FOLDERS[each]}/")
                checks[FOLDERS[each]] = check_written(work, target, row)
                reporter.doing(f"storing {FOLDERS[each]}/")
                files += store_directory(stages, target)
    artifacts = {ARTIFACTS[each]: stages.uri("merge", FOLDERS[each]) for each in formats}
    made = {name: asdict(check) for name, check in checks.items()}
    stages.commit("merge", files, artifacts=artifacts, checks=made)
    return StageResult(
        stage="merge", outcome="succeeded", reason="Merged", message=_summary(checks), artifacts=artifacts
    )


def check_written(work: Work, directory: Path, row: ReferenceRow) -> Check:
    """Compare a written model with the unmerged one, by tensor and by logits. Raises UserError when they differ."""
    written = open_checkpoint(directory)
    if wrong := find_wrong_tensor(written, work.source(), work.weights):
        raise check_failed(directory, f"tensor {wrong} is not the base's with what was learned in it")
    tokenizer = load_tokenizer(work.directory)
    positions = min(_POSITIONS, row.batch["input_ids"].shape[1])
    compute = partial(layerwise_logits, tokenizer=tokenizer, batch=row.batch, positions=positions)
    found = compute(written, written.architecture)
    of_source = partial(compute, work.source(), work.architecture)
    moved = None
    if work.weights is None:
        wanted = of_source()
    else:
        below = work.weights.without_adapter()
        wanted = of_source(change=below, adapter=work.weights.adapter)
        moved = _distance(of_source(change=below), wanted)
    tolerance = max(TOLERANCES[entry.dtype] for entry in written.entries)
    check = Check(row.place, positions, _distance(found, wanted), tolerance, moved)
    if not check.difference <= tolerance:  # also true for NaN
        raise check_failed(
            directory,
            f"the logits on {row.place} differ from the trained ones by {check.difference:.2e} of their norm, allowed "
            f"are {tolerance:.0e}",
        )
    if moved is not None and check.difference > moved / 2:
        logger.warning(
            "rounding hides much of what was learned: the adapter moves the logits on %s by %.1e of their norm, and "
            "storing its sum with the base differs from it by %.1e; use the adapter, or a base in fp32",
            row.place, moved, check.difference,
        )  # fmt: skip
    return check


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _prepare(context: RunContext, trained: Manifest, scratch: Path) -> Work:
    config, stages = context.config, context.stages
    kind = "adapter" if config.method == "lora" else "model"
    files = trained.named(f"{kind}/")
    check_space(scratch.parent, sum(file.size for file in files) + MARGIN, f"what was trained ({kind})")
    stages.fetch("train", files, scratch)
    if config.method == "full":
        directory = scratch / kind
        return Work(directory, open_checkpoint(directory).architecture, None, Edit())
    check_base(config, trained.extra["base"])
    context.reporter.doing("fetching the base model")
    base = fetch_directory(config.model.source, field="spec.model.source")
    source = open_checkpoint(base)
    architecture = source.architecture
    if config.image.tile_size is not None:
        architecture = replace(architecture, image_size=config.image.tile_size)
    positions = (architecture.image_size // architecture.patch_size) ** 2 + 1
    weights = read_trained_weights(scratch / kind, source, positions=positions)
    weights.check_all_used([piece.name for piece in source.pieces()], stages.uri("train", kind))
    settings = partial(
        trained_config, config=config, template=architecture.template, image_size=architecture.image_size
    )
    return Work(base, architecture, weights, Edit(weights, settings, architecture.image_size))


def _formats(config: RunConfig, work: Work) -> list[Format]:
    """The formats to write; full training has already written upstream's where the base was in it."""
    there = config.method == "full" and not work.source().is_native
    return [each for each in FOLDERS if each in config.merge.formats and not (there and each == "upstream")]


def _summary(checks: dict[str, Check]) -> str:
    words = [f"{name}/ computes what was trained to {check.difference:.1e}" for name, check in checks.items()]
    return "; ".join(words)
