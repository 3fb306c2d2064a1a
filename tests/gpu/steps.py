"""Optimizer steps of a random model, as a run takes them, and what they cost beside the estimates."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu.card import begin_peak, count_waits, matmul_flops, peak_bytes, peak_flops, seconds_of
from gpu.models import IMAGE_TOKEN, TINY, catalogue_model, random_model, random_rows
from internvl_api.memory.estimate import memory
from internvl_api.memory.setup import Row, Setup, setup_of
from internvl_api.models.catalogue import CatalogueModel
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.data.collate import collate
from internvl_trainer.data.loader import Batch, Window
from internvl_trainer.data.sample import Sample
from internvl_trainer.distributed import Group
from internvl_trainer.model.adapters import apply_method
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.quantize import check_quantization
from internvl_trainer.train.chat import freeze
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.components import lora_settings
from internvl_trainer.train.engine import apply_step, build_engine, on_device, parameter_groups, run_backward
from internvl_trainer.train.step_losses import StepLosses
from quantized import quantize_language_model
from torch.utils.flop_counter import FlopCounterMode
from trainer.runs import make_config

Figures = dict[str, float | str]


@dataclass(frozen=True)
class Work:
    """Model, method and rows of a measured step.

    Attributes:
        layers: of the language model; None for all of them.
        rows, micro_batch: of a step; of a forward pass.
        most_tiles, most_text: of a row.
    """

    model: str
    method: str = "lora"
    layers: int | None = None
    quantize: bool = False
    rows: int = 8
    micro_batch: int = 4
    most_tiles: int = 7
    most_text: int = 512
    steps: int = 8

    @property
    def shape(self) -> CatalogueModel:
        """The model's dimensions."""
        return catalogue_model(self.model, self.layers)

    def samples(self) -> list[Sample]:
        """The rows of a step."""
        return random_rows(self.shape, self.rows, most_tiles=self.most_tiles, most_text=self.most_text)

    def parts(self) -> list[list[Sample]]:
        """The rows of each micro-batch."""
        rows = self.samples()
        return [rows[start : start + self.micro_batch] for start in range(0, len(rows), self.micro_batch)]

    def config(self) -> RunConfig:
        """A run's configuration with this work."""
        lora: dict[str, Any] = {"languageRank": 16} | ({"quantize": "nf4"} if self.quantize else {})
        return make_config(
            "/unused",
            model={} if self.model == TINY.name else {"name": self.model},
            method=self.method,
            gpusPerWorker=0 if self.model == TINY.name else 1,
            lora=lora,
            training={
                "precision": "bf16",
                "globalBatchSize": self.rows,
                "microBatchSize": self.micro_batch,
                "learningRate": 1e-4,
                "freeze": {"vision": True, "projector": self.method == "lora"},
            },
        )

    def setup(self) -> Setup | None:
        """The memory estimate's input for the longest micro-batch; None for a model that is not in the catalogue."""
        found = setup_of(self.config())
        return replace(found, model=self.shape, micro_batch=1, world_size=1) if found else None

    def longest(self) -> Row:
        """The micro-batch with the most tokens, as one row."""
        part = max(self.parts(), key=lambda rows: sum(row.length for row in rows))
        supervised = sum(int((row.labels != -100).sum()) for row in part)
        return Row(sum(row.length for row in part), sum(len(row.tiles) for row in part), supervised)


def measure_steps(work: Work, group: Group) -> Figures:
    """Tokens a second, host waits, memory and the use of the card, of steps that a run takes with this work."""
    device = group.device
    if work.quantize:
        check_quantization(device)
    begin_peak(device)
    config, window = work.config(), make_window(work.parts(), device)
    engine = build(work, config, group)
    step = 0

    def take() -> float:
        nonlocal step
        step += 1
        return take_step(engine, window, config, group, step)

    first = take()
    take()  # allocations and kernels are as in all later steps
    seconds = median(seconds_of(take, device) for _ in range(work.steps))
    figures: Figures = {
        "attention": engine.module.native.config._attn_implementation,
        "trained parameters": sum(each.numel() for each in engine.module.parameters() if each.requires_grad),
        "tokens a step": window.tokens,
        "seconds a step": seconds,
        "tokens a second": window.tokens / seconds,
        "host waits a step": count_waits(take, device),
        "loss before": first,
        "loss after": take(),
    }
    figures |= _memory(work, peak_bytes(device))
    return figures | _use(work, seconds, device)


def build(work: Work, config: RunConfig, group: Group) -> Any:
    """The engine of a run with this work."""
    model = random_model(work.shape, group.device)
    if work.quantize:
        quantize_language_model(model, group.device)
    prepare(model, config)
    return build_engine(config, model, parameter_groups(model, 0.05, decay_all=False), group)


def prepare(model: ChatModel, config: RunConfig, *, checkpointing: bool = True) -> ChatModel:
    """The same model, ready to learn as the configuration says."""
    apply_method(model, config.method, freeze=freeze(config), lora=lora_settings(config))
    model.set_gradient_checkpointing(checkpointing)
    return model.train()


def make_window(parts: list[list[Sample]], device: torch.device, image_token_id: int = IMAGE_TOKEN) -> Window:
    """The micro-batches of one step, as the loader gives them."""
    batches = [_pinned(collate(part, image_token_id=image_token_id), device) for part in parts]
    weights = [float(len(batch["supervised"])) for batch in batches]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    rows = sum(map(len, parts))
    return Window(batches, weights, int(sum(weights)), rows=rows, tokens=tokens, places=tokens, waited=0.0)


def _pinned(batch: Batch, device: torch.device) -> Batch:
    return {name: each.pin_memory() for name, each in batch.items()} if device.type == "cuda" else batch


def take_step(engine: Any, window: Window, config: RunConfig, group: Group, step: int) -> float:
    """Take one optimizer step; the mean loss of its tokens over all ranks."""
    weights = group.sum(window.weights)
    losses = StepLosses(["rows"])
    run_backward(engine, window, weights, config, group, step, losses, lambda: False)
    total, _ = losses.read()
    apply_step(engine, config.training.learning_rate)
    return group.sum([total])[0] / sum(weights)


def count_flops(work: Work) -> int:
    """Operations of a step's forward and backward passes without recomputation, counted on tensors without data.

    Quantized weights count as those in bf16. Products of attention count for all pairs of a row's tokens, as
    FlopCounterMode does everywhere.
    """
    meta = torch.device("meta")
    model = prepare(random_model(work.shape, meta), replace(work, quantize=False).config(), checkpointing=False)
    with FlopCounterMode(display=False) as counter:
        for part in work.parts():
            model(**on_device(collate(part, image_token_id=IMAGE_TOKEN), meta)).loss_sum.backward()
    return int(counter.get_total_flops())


def _memory(work: Work, measured: int | None) -> Figures:
    """The measured peak beside the estimate; nothing where one of them is not there."""
    setup = work.setup()
    if measured is None or setup is None:
        return {}
    estimated = memory(setup, work.longest()).total
    return {
        "peak memory, GB": measured / 1e9,
        "estimated memory, GB": estimated / 1e9,
        "error of the estimate, %": 100 * (estimated - measured) / measured,
    }


def _use(work: Work, seconds: float, device: torch.device) -> Figures:
    """How much of the card's arithmetic a step uses, recomputation not counted as work."""
    done = count_flops(work) / seconds
    figures: Figures = {"TFLOP a second, counted": done / 1e12}
    if device.type == "cuda":
        figures["share of the card's own matrix product, %"] = 100 * done / matmul_flops(device)
        if peak := peak_flops(torch.cuda.get_device_name(device)):
            figures["MFU, %"] = 100 * done / peak
    return figures


def measure_checkpoint(work: Work, group: Group) -> Figures:
    """How long training stands still for a checkpoint, and how long it takes to store, in a local folder."""
    config, window = work.config(), make_window(work.parts(), group.device)
    engine = build(work, config, group)
    take_step(engine, window, config, group, 1)
    stalls, stored = [], []
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        checkpoints = Checkpoints(FolderStorage(Path(folder), field="spec.output"), group, fingerprint="f", keep=1)
        for step in (1, 2):
            began = time.monotonic()
            checkpoints.save(engine, step, {})
            stalls.append(time.monotonic() - began)
            saved = checkpoints.finish()
            assert saved is not None
            stored.append(saved)
    return {
        "checkpoint, GB": stored[-1].size / 1e9,
        "first stall, s": stalls[0],
        "later stall, s": stalls[1],
        "stored after, s": stored[-1].seconds,
    }
