"""Setup of training: base model, method, engine and data, before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from internvl_api.constants import FETCHING_MODEL, NOTING_MODEL, STARTING_ENGINE
from internvl_api.run_config import RunConfig

from internvl_trainer.data.loader import Loader
from internvl_trainer.errors import UserError
from internvl_trainer.model.base_identity import describe_base
from internvl_trainer.model.quantize import check_quantization
from internvl_trainer.run_context import GroupContext
from internvl_trainer.train.base_model import BaseModel, fetch_base
from internvl_trainer.train.chat import chat_components
from internvl_trainer.train.components import Components
from internvl_trainer.train.engine import build_engine
from internvl_trainer.train.retrieval import retrieval_components

logger = logging.getLogger(__name__)


@dataclass
class TrainingSetup:
    """What the training loop works with.

    Attributes:
        engine: the DeepSpeedEngine around the model.
        base: the model that training began with.
        base_identity: which base model it is; see describe_base.
    """

    context: GroupContext
    components: Components
    engine: Any
    total_steps: int
    base: BaseModel
    base_identity: dict[str, Any]

    def loader(self, first_step: int) -> Loader:
        """Batches of this rank from `first_step` on."""
        training, group = self.context.config.training, self.context.group
        windows = self.components.order.windows(
            first_step,
            self.total_steps,
            rank=group.rank,
            world_size=group.world_size,
            micro_batch=training.micro_batch_size,
        )
        return Loader(
            self.components.dataset,
            windows,
            collation=self.components.collation,
            workers=training.data_workers,
            pin_memory=group.device.type == "cuda",
        )


def prepare(context: GroupContext) -> TrainingSetup:
    """Fetch the base model, load it, open the data and build the engine. Raises UserError for what is wrong."""
    config, group, reporter = context.config, context.group, context.reporter
    check_batch(config, group.world_size)
    if config.lora.quantize is not None:
        check_quantization(group.device)
    reporter.doing(FETCHING_MODEL)
    base = fetch_base(context)
    reporter.doing(NOTING_MODEL)
    base_identity = group.first(describe_base(config) if group.leads else None)
    make_components = retrieval_components if config.model.kind == "retrieval" else chat_components
    components = make_components(context, base)
    total_steps = components.order.count_steps(config.training.epochs, config.training.max_steps)
    if group.leads:
        logger.info("%s", describe_length(total_steps, config.training.epochs, config.training.max_steps))
    reporter.doing(STARTING_ENGINE)
    return TrainingSetup(
        context=context,
        components=components,
        engine=build_engine(config, components.model, components.groups, group),
        total_steps=total_steps,
        base=base,
        base_identity=base_identity,
    )


def describe_length(total_steps: int, epochs: float, max_steps: int | None) -> str:
    """How long the run is, and which of training.epochs and training.maxSteps decides it."""
    if max_steps is None:
        return f"{total_steps} steps: training.epochs is {epochs:g}"
    if max_steps == total_steps:
        return f"{total_steps} steps: training.maxSteps decides, before training.epochs {epochs:g} is reached"
    return f"{total_steps} steps: training.epochs {epochs:g} decides, before training.maxSteps {max_steps} is reached"


def check_batch(config: RunConfig, world_size: int) -> None:
    """Raises UserError unless this world size splits the global batch into whole micro-batches on every rank."""
    training = config.training
    per_forward = world_size * training.micro_batch_size
    if training.global_batch_size % per_forward:
        raise UserError(
            "BatchNotDivisible",
            f"found {training.global_batch_size}, which {world_size} processes x microBatchSize "
            f"{training.micro_batch_size} = {per_forward} does not divide; change one of them",
            "spec.training.globalBatchSize",
        )
