"""Counts the bytes of the tensors that an export holds at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from internvl_trainer.train import export

Tensors = Iterator[tuple[str, torch.Tensor]]


class Held:
    """The collected tensors that are still referred to."""

    def __init__(self) -> None:
        self._tensors: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self.peak = 0

    def watch(self, tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            copy = tensor.clone()
            self._tensors.append((weakref.ref(copy), copy.nbytes))
            self.peak = max(self.peak, sum(size for known, size in self._tensors if known() is not None))
            yield name, copy
            del copy


def watched_export(monkeypatch: pytest.MonkeyPatch) -> Held:
    """What exports in this test hold, each collected tensor with memory of its own, as under ZeRO-3."""
    held, full_tensors = Held(), export.full_tensors
    monkeypatch.setattr(export, "full_tensors", lambda *given: held.watch(full_tensors(*given)))
    return held
