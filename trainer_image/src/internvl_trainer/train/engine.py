"""The DeepSpeed engine of a run: model, optimizer, and what one optimizer step does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from internvl_api.run_config import RunConfig

from internvl_trainer.data.collate import HOST_TENSORS
from internvl_trainer.data.loader import Batch, Window
from internvl_trainer.distributed import Group
from internvl_trainer.import_deepspeed import deepspeed
from internvl_trainer.train.deepspeed_config import deepspeed_config, fit_buckets
from internvl_trainer.train.optimizer_shards import begin_optimizer_state
from internvl_trainer.train.step_losses import StepLosses


def build_engine(config: RunConfig, model: torch.nn.Module, groups: list[dict[str, Any]], group: Group) -> Any:
    """A DeepSpeedEngine around the model, with our own AdamW over the parameter groups."""
    training = config.training
    learning = [parameter for each in groups for parameter in each["params"]]
    trainable = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in learning)
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=training.adam_betas,
        eps=training.adam_epsilon,
        fused=group.device.type == "cuda",
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=fit_buckets(deepspeed_config(config, group.world_size), trainable),
        dist_init_required=False,
    )
    begin_optimizer_state(engine)
    engine.train()
    return engine


def parameter_groups(model: torch.nn.Module, weight_decay: float, *, decay_all: bool) -> list[dict[str, Any]]:
    """The optimizer's groups: matrices decay; vectors (norms, biases) decay only with `decay_all`, as upstream."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            flat = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (vectors if flat and not decay_all else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def run_backward(
    engine: Any,
    window: Window,
    weights: Sequence[float],
    config: RunConfig,
    group: Group,
    step: int,
    losses: StepLosses,
    is_stopping: Callable[[], bool],
) -> bool:
    """Compute the gradients of one optimizer step on this rank, without waiting for the device; whether it did.

    False when it is told to stop between two micro-batches: the step is abandoned, weights and optimizer are those of
    the step before.

    Args:
        weights: sums of loss weights of each micro-batch over all ranks.
        losses: gets the losses of this rank.
        is_stopping: whether any rank is told to stop; all ranks ask together.
    """
    shares = loss_shares(window.weights, weights, group.world_size, config)
    last = len(window.batches) - 1
    for number, (batch, share) in enumerate(zip(window.batches, shares, strict=True)):
        if number and is_stopping():
            return False
        if config.training.max_tokens_per_micro_batch is not None:  # the number of passes differs from step to step
            engine.set_gradient_accumulation_boundary(number == last)
        seed_micro_batch(config.training.seed, step, number * group.world_size + group.rank)
        output = forward(engine, batch, group.device, losses)
        engine.backward(output.loss_sum * share, scale_wrt_gas=False)
        if number < last:
            engine.step()  # counts the micro-batch; the caller's step updates the weights
    return True


def forward(engine: Any, batch: Batch, device: torch.device, losses: StepLosses) -> Any:
    """The engine's output for a batch, whose losses `losses` gets."""
    inputs = on_device({name: tensor for name, tensor in batch.items() if name != "sources"}, device)
    output = engine(**inputs)
    sources = batch.get("sources")
    losses.add(output.loss_sum, None if sources is None else output.token_losses, sources)
    return output


def loss_shares(own: Sequence[float], everywhere: Sequence[float], world_size: int, config: RunConfig) -> list[float]:
    """The factor of each micro-batch's weighted SUM of token losses.

    A token counts by its weight in any micro-batch: the divisor is the sum of weights in the whole step
    over all ranks, so that the gradients are those of one big batch. (DeepSpeed divides by the world size once more.)
    `compat: upstream` takes the mean of means instead: each micro-batch by its own weights, or, packed, by the average
    of the ranks' weights in this micro-batch (loss_reduction_all_gather).

    Args:
        own, everywhere: sums of loss weights of each micro-batch, of this rank and of all ranks.
    """
    if config.data.compat != "upstream":
        return [world_size / (sum(everywhere) or 1.0)] * len(own)
    divisors = [each / world_size for each in everywhere] if config.training.packing.enabled else own
    return [1 / ((divisor or 1.0) * len(own)) for divisor in divisors]


def apply_step(engine: Any, rate: float) -> float:
    """Update the weights at this learning rate; the norm of the gradients before clipping.

    It waits for the update: DeepSpeed gives the norm only after it, and the loss is read before, to be refused.
    """
    set_learning_rate(engine.optimizer.param_groups, rate)
    engine.step()
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Set this rate in every group, times the group's `lr_scale` where it has one."""
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Seed dropout and drop path by the micro-batch's place in the run, so that attempts and world sizes agree."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> 1))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the model's device, but for what the model reads on the host."""
    return {
        name: tensor if name in HOST_TENSORS else tensor.to(device, non_blocking=True) for name, tensor in batch.items()
    }
