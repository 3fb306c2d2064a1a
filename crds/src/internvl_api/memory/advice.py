"""Advice for a run that does not fit its GPUs: which settings to change."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from internvl_api.memory.estimate import Estimate, memory
from internvl_api.memory.setup import Row, Setup, longest_row, typical_row
from internvl_api.quantity import gib

_LORA_RANK = 16  # of upstream's recipes
_MOST_GPUS = 1024
_LENGTH_STEP = 1024  # tokens


class Remedy(NamedTuple):
    """A change of the spec as text, and the bytes that a GPU then needs."""

    words: str
    total: int


def largest_micro_batch(setup: Setup, gpu_memory: int, row: Row | None = None) -> int:
    """The largest microBatchSize that fits `gpu_memory` and divides the global batch; 0 when none does.

    Args:
        row: the size of every row; None: the longest that is allowed.
    """
    row = row or longest_row(setup)
    rows = setup.global_batch // setup.world_size
    fitting = (
        size
        for size in range(rows, 0, -1)
        if rows % size == 0 and memory(replace(setup, micro_batch=size), row).total <= gpu_memory
    )
    return next(fitting, 0)


def advice(estimate: Estimate) -> str:
    """One paragraph: whether the run fits, by how much, and which changes make it fit."""
    setup, have = estimate.setup, gib(estimate.gpu_memory)
    typical, longest = gib(estimate.typical.total), gib(estimate.longest.total)
    rows = f"microBatchSize {setup.micro_batch}"
    if estimate.verdict == "fits":
        return f"Fits: {longest} of {have} a GPU with the longest rows ({rows}), {typical} with typical rows."
    if estimate.verdict == "tight":
        over = gib(estimate.longest.total - estimate.gpu_memory)
        opening = (
            f"Fits typical rows ({typical} of {have} a GPU, {rows}), but a micro batch of the longest rows, "
            f"{setup.max_seq_length} tokens, needs {longest}: {over} too much."
        )
    else:
        over = gib(estimate.typical.total - estimate.gpu_memory)
        opening = f"Does not fit: {typical} of {have} a GPU with typical rows ({rows}), {over} too much."
    found = [f"{remedy.words} ({gib(remedy.total)})" for remedy in remedies(estimate)]
    if not found:
        return f"{opening} No setting makes it fit: use GPUs with more memory, or a smaller model."
    return f"{opening} What fits: {'; '.join(found)}."


def remedies(estimate: Estimate) -> list[Remedy]:
    """Single changes that make the run fit; without one, all savings together on the fewest GPUs that suffice.

    Judged by typical rows where those do not fit, else by the longest rows.
    """
    kind = typical_row if estimate.verdict == "does not fit" else longest_row

    def fitting(changes: Iterable[tuple[str, Setup]]) -> Iterator[Remedy]:
        for words, setup in changes:
            total = memory(setup, kind(setup)).total
            if total <= estimate.gpu_memory:
                yield Remedy(words, total)

    setup = estimate.setup
    stage = _last_stage(setup)
    thrifty = replace(setup, zero_stage=stage, micro_batch=1, gradient_checkpointing=True)
    single = [
        *fitting(_smaller_batch(setup, estimate.gpu_memory, kind(setup))),
        *(islice(fitting(_shorter_rows(setup)), 1) if estimate.verdict == "tight" else ()),
        *fitting(_other_settings(setup)),
        *islice(fitting((f"{more.world_size} GPUs", more) for more in _more_gpus(setup)), 1),
    ]
    together = f"zeroStage {stage}, microBatchSize 1 and gradientCheckpointing true"
    combined = ((f"{more.world_size} GPUs with {together}", more) for more in (thrifty, *_more_gpus(thrifty)))
    return single or list(islice(fitting(combined), 1))


def _smaller_batch(setup: Setup, gpu_memory: int, row: Row) -> Iterator[tuple[str, Setup]]:
    size = largest_micro_batch(setup, gpu_memory, row)
    if 0 < size < setup.micro_batch:
        yield f"microBatchSize {size}", replace(setup, micro_batch=size)


def _shorter_rows(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Lower maxSeqLength, not below a typical row. Preflight then reports longer rows as findings."""
    longest = (setup.max_seq_length - 1) // _LENGTH_STEP * _LENGTH_STEP
    for length in range(longest, typical_row(setup).tokens - 1, -_LENGTH_STEP):
        yield f"maxSeqLength {length}", replace(setup, max_seq_length=length)


def _other_settings(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if not setup.gradient_checkpointing:
        yield "gradientCheckpointing true", replace(setup, gradient_checkpointing=True)
    if setup.world_size > 1:
        for stage in range(setup.zero_stage + 1, _last_stage(setup) + 1):
            yield f"zeroStage {stage}", replace(setup, zero_stage=stage)
    if setup.learns_language:
        adapted = replace(setup, language_rank=_LORA_RANK, learns_language=False, learns_projector=False)
        yield f"method lora with languageRank {_LORA_RANK}", adapted


def _last_stage(setup: Setup) -> int:
    """The highest usable ZeRO stage: ZeRO-3 cannot shard 4-bit weights."""
    return 2 if setup.quantized else 3


def _more_gpus(setup: Setup) -> Iterator[Setup]:
    """Setups with 2, 4, … times the GPUs, while the global batch has a micro batch for each."""
    size = setup.world_size * 2
    while size <= _MOST_GPUS and setup.global_batch % (size * setup.micro_batch) == 0:
        yield replace(setup, world_size=size)
        size *= 2
