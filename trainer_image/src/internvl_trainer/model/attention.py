"""Attention over the rows of a flat batch: a token sees the earlier tokens of its own row, and no dense mask is made.

transformers calls these functions by the name in a model's config. A pass without `rows` (generation, the tiles of the
vision tower) uses transformers' SDPA attention, whose kernel needs no mask for tiles: they all have the same length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

VARLEN, FLASH_ATTN, SDPA = "rows_varlen", "rows_fa2", "rows_sdpa"
"""Names of the implementations: PyTorch's variable-length kernel, that of the package flash-attn, and one call of
scaled_dot_product_attention a row. transformers reserves names with `flash`."""

MOST_MASKED = 8192
"""Length of a row above which a dense mask is worth a warning: one byte a pair of tokens, 64 MiB here."""

_warned: set[str] = set()  # units of work of whose masks the log already warns

_MOST_ERROR = 0.05  # of a kernel in bf16, whose numbers have 8 bits: 13 units in the last place


@dataclass(frozen=True)
class Rows:
    """Where the rows of a flat batch begin, for every layer of a pass.

    Attributes:
        starts: (rows + 1,) int32 on the model's device; the last is the number of tokens.
        lengths: of each row, on the host, so that no layer has to wait for the device.
    """

    starts: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, starts: torch.Tensor, device: torch.device) -> Rows:
        """From the collator's `row_starts`, which are on the host."""
        places = starts.tolist()
        lengths = tuple(end - begin for begin, end in pairwise(places))
        return cls(starts.to(device, non_blocking=True), lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rows, float | None, int | None], torch.Tensor]
"""(T, heads, D) from (T, heads, D) queries, (T, key heads, D) keys and values, rows, scale, sliding window."""


def attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float | None, window: int | None
) -> torch.Tensor:
    """The result of PyTorch's variable-length kernel; CUDA, bf16 or fp16."""
    longest = rows.longest
    result = varlen_attn(
        query, key, value, rows.starts, rows.starts, longest, longest,
        scale=scale, window_size=(_left(window), 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return result  # type: ignore[return-value]  # a pair only when asked for


def attend_flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float | None, window: int | None
) -> torch.Tensor:
    """The result of the package flash-attn's kernel; CUDA, bf16 or fp16."""
    from flash_attn import flash_attn_varlen_func

    longest = rows.longest
    result: torch.Tensor = flash_attn_varlen_func(
        query, key, value, rows.starts, rows.starts, longest, longest,
        softmax_scale=scale, causal=True, window_size=(_left(window), 0),
    )  # fmt: skip
    return result


def attend_each_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float | None, window: int | None
) -> torch.Tensor:
    """The result of one scaled_dot_product_attention a row; any device and dtype."""
    grouped = query.shape[1] != key.shape[1]
    split = (torch.split(each.transpose(0, 1)[None], list(rows.lengths), dim=2) for each in (query, key, value))
    results = []
    for queries, keys, values in zip(*split, strict=True):
        mask = window_mask(queries.shape[2], window, query.device)
        results.append(
            functional.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(results, dim=2)[0].transpose(0, 1)


def window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool, True where a token sees another; None for a row that fits into the sliding window."""
    if window is None or length <= window:
        return None
    _warn_of_mask(f"a row of {length} tokens with a sliding window of {window}", (length, length), "a layer")
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)


def padded_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """transformers' mask of a pass without rows: (B, 1, queries, keys) bool, or None where its kernel needs none."""
    mask: torch.Tensor | None = sdpa_mask(*arguments, **options)
    if mask is not None:
        batch, _, queries, _ = mask.shape
        _warn_of_mask(f"a padded (or sliding-window) batch of {batch} x {queries} tokens", mask.shape, "a pass")
    return mask


def _warn_of_mask(what: str, shape: Sequence[int], unit: str) -> None:
    """Warn of a dense mask of many queries, but only of the first for each unit of the work that makes one."""
    if shape[-2] > MOST_MASKED and unit not in _warned:
        _warned.add(unit)
        logger.warning(
            "%s needs a dense mask of %d MiB %s; later ones are not reported. Training on a GPU in bf16 needs none",
            what, math.prod(shape) >> 20, unit,
        )  # fmt: skip


def _left(window: int | None) -> int:
    """Tokens before its own that a token sees, as the kernels want it: -1 for all of them."""
    return -1 if window is None else window - 1


KERNELS: dict[str, Kernel] = {VARLEN: attend_varlen, FLASH_ATTN: attend_flash_attn, SDPA: attend_each_row}


def attend(
    kernel: Kernel,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    rows: Rows | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """(1, T, heads, D) as transformers' attention functions give it, of (1, heads, T, D).

    Without `rows`, the result of transformers' SDPA attention. Raises ValueError for attention dropout, which no
    published model has.
    """
    if rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if dropout:
        raise ValueError(f"found attention_dropout {dropout} in the language model's config; flat batches need 0")
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    return kernel(queries, keys, values, rows, scaling, sliding_window)[None], None


for _name, _kernel in KERNELS.items():
    AttentionInterface.register(_name, partial(attend, _kernel))
    AttentionMaskInterface.register(_name, padded_mask)  # for passes without rows


def flat_arguments(implementation: str | None, rows: Rows) -> dict[str, Any]:
    """Keyword arguments of a language model for a flat batch, whose position ids restart in each row.

    Other implementations get none: transformers finds the rows by their positions, and makes a dense mask.
    """
    if implementation not in KERNELS:
        return {"attention_mask": None}
    # transformers takes a mask of four dimensions as it is, and makes none of its own.
    return {"attention_mask": torch.empty(1, 1, 0, 0, device=rows.starts.device), "rows": rows}


def choose_attention(device: torch.device, dtype: torch.dtype = torch.bfloat16, *, flat: bool = True) -> str:
    """The fastest implementation that works on the device, by a tiny call of each; in fp32 only SDPA does.

    Args:
        flat: False for a model that never gets a flat batch: only SDPA is of use then.
    """
    if not flat or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return SDPA
    return next((name for name in (FLASH_ATTN, VARLEN) if _is_working(name, device)), SDPA)


def _is_working(name: str, device: torch.device) -> bool:
    """Whether a tiny call, forward and backward, gives what SDPA gives. A missing package logs nothing."""
    try:
        difference = kernel_error(KERNELS[name], device)
    except ImportError:
        return False
    except Exception as error:  # noqa: BLE001 - anything that a driver, a build for another GPU or an old kernel raises
        logger.warning("attention %s does not work here (%s: %s)", name, type(error).__name__, error)
        return False
    if is_close := difference < _MOST_ERROR:
        logger.debug("attention %s differs from fp64 by %.2g of the largest value", name, difference)
    else:
        logger.warning("attention %s differs from fp64 by %.2g of the largest value; not using it", name, difference)
    return is_close


def kernel_error(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    lengths: Sequence[int] = (5, 11),
    heads: tuple[int, int] = (4, 2),
    size: int = 64,
    window: int | None = None,
) -> float:
    """Largest difference of results and gradients from fp64 SDPA, as a share of the largest value, on random rows.

    Args:
        lengths: tokens of each row.
        heads: of queries; of keys and values.
        size: of a head.
        window: the sliding window in tokens.
    """
    generator = torch.Generator().manual_seed(0)
    rows = Rows.of(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    inputs = [
        torch.randn(sum(lengths), count, size, generator=generator).to(dtype)
        for count in (heads[0], heads[1], heads[1])
    ]
    upstream = torch.randn(sum(lengths), heads[0], size, generator=generator)
    differences = []
    for found, expected in zip(
        _results(kernel, [each.to(device) for each in inputs], rows, upstream, window),
        _results(attend_each_row, [each.double().to(device) for each in inputs], rows, upstream, window),
        strict=True,
    ):
        differences.append(((found.double() - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


def _results(
    kernel: Kernel, inputs: list[torch.Tensor], rows: Rows, upstream: torch.Tensor, window: int | None
) -> list[torch.Tensor]:
    """The kernel's result and the gradients of its inputs."""
    learning = [each.detach().requires_grad_() for each in inputs]
    result = kernel(learning[0], learning[1], learning[2], rows, None, window)
    return [result.detach(), *torch.autograd.grad(result, learning, upstream.to(result))]
