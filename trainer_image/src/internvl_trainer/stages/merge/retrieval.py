"""The merge stage of a retrieval model: upstream's layout of the base with what was trained, a tensor at a time.

Every tensor is read back and computed again, which shows all that a comparison of features could.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from internvl_api.status import StageResult

from internvl_trainer.artifacts.disk_space import naming_full_disk
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.model.base_identity import check_base
from internvl_trainer.model.checkpoint_format.shards import plan_upstream, write_shards
from internvl_trainer.model.checkpoint_source import CONFIG_FILE, Source
from internvl_trainer.model.convert_checkpoint import copy_files, files_as_before
from internvl_trainer.model.trained_weights import TrainedWeights, read_trained_weights
from internvl_trainer.model.verify_merge import find_wrong_tensor
from internvl_trainer.retrieval.load import changed_config, open_retrieval_checkpoint
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.merge.shared import check_failed, check_room, store_directory

_FOLDER = "model"


def merge_retrieval_model(context: RunContext) -> StageResult:
    """Write, check and store the whole model; the manifest last. Raises UserError for what the user must correct."""
    config, stages, reporter = context.config, context.stages, context.reporter
    trained = stages.require("train")
    stages.discard("merge")  # what a killed attempt left
    with tempfile.TemporaryDirectory(prefix="merge-") as name:
        scratch = Path(name)
        stages.fetch("train", trained.named("adapter/"), scratch)
        check_base(config, trained.extra["base"])
        reporter.doing("fetching the base model")
        base = open_retrieval_checkpoint(fetch_directory(config.model.source, field="spec.model.source"))
        size = config.image.tile_size or base.architecture.image_size
        weights = read_trained_weights(scratch / "adapter", base, positions=(size // _patch(base)) ** 2 + 1)
        weights.check_all_used([piece.name for piece in base.pieces()], stages.uri("train", "adapter"))
        needed = check_room(context.storage, base, scratch, 1)
        with naming_full_disk(scratch.parent, needed, "a merged model"):
            reporter.doing(f"writing {_FOLDER}/")
            target = scratch / _FOLDER
            write_merged(base, weights, target, size)
            reporter.doing(f"checking {_FOLDER}/")
            if wrong := find_wrong_tensor(open_retrieval_checkpoint(target), base, weights):
                raise check_failed(target, f"tensor {wrong} is not the base's with what was learned in it")
            reporter.doing(f"storing {_FOLDER}/")
            files = list(store_directory(stages, target))
    artifacts = {"model": stages.uri("merge", _FOLDER)}
    stages.commit("merge", files, artifacts=artifacts)
    message = f"{_FOLDER}/ has the base's tensors with what was trained in them, each computed again"
    return StageResult(stage="merge", outcome="succeeded", reason="Merged", message=message, artifacts=artifacts)


def write_merged(base: Source, weights: TrainedWeights, target: Path, image_size: int) -> None:
    """The base's files with other values; config.json says another size of pictures, where there is one."""
    target.mkdir()
    planned = plan_upstream(base.pieces(), base.architecture, weights)
    for _ in write_shards(files_as_before(planned), target):
        pass
    config = changed_config(base.upstream_config or {}, image_size)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_files(base.directory, target)


def _patch(base: Source) -> int:
    side: int = base.architecture.vision.patch_size[0]
    return side
