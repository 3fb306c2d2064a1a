"""Measures the loss of long rows with all logits at once and in chunks. It asserts no limits."""

from __future__ import annotations

import subprocess
import sys

from internvl_api.quantity import gib
from rich.console import Console
from rich.table import Table

# InternVL3-1B's head. Three chunks of positions.
POSITIONS, HIDDEN, VOCABULARY = 3072, 896, 151_674

# Separate processes: each has its own peak. (VmHWM starts at zero; getrusage's peak survives exec, so it would include
# the parent's.)
_MEASURE = """
import re, sys, time
from pathlib import Path
import torch
from internvl_trainer.model.head_loss import HeadLoss
positions, hidden_size, vocabulary, chunked, learns = map(int, sys.argv[1:])
torch.manual_seed(0)
head = torch.nn.Linear(hidden_size, vocabulary, bias=False).requires_grad_(bool(learns))
hidden = torch.randn(positions, hidden_size, requires_grad=True)
targets, weights = torch.randint(vocabulary, (positions,)), torch.ones(positions)
if learns:
    head.weight.grad = torch.zeros_like(head.weight)

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before, began = memory("VmRSS"), time.monotonic()
if chunked:
    loss, _ = HeadLoss(vocabulary).compute(head, hidden, targets, weights)
else:
    loss = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
loss.backward()
print(time.monotonic() - began, memory("VmHWM") - before, loss.item(), hidden.grad.norm().item())
"""


def bench_loss() -> None:
    """Forward and backward pass of the head and its loss, in fp32, with a frozen and with a learning head."""
    title = f"Loss of {POSITIONS:,} positions, {VOCABULARY:,} words, hidden size {HIDDEN}, fp32"
    table = Table(title=title)
    for column in ("head", "logits", "s", "peak", "loss", "norm of the gradient"):
        table.add_column(column)
    for learns in (False, True):
        for chunked in (False, True):
            seconds, peak, loss, norm = _measure(chunked, learns)
            table.add_row(
                "learns" if learns else "frozen",
                "in chunks" if chunked else "at once",
                f"{seconds:.1f}",
                gib(int(peak)),
                f"{loss:.1f}",
                f"{norm:.5f}",
            )
    Console().print(table)


def _measure(chunked: bool, learns: bool) -> tuple[float, ...]:
    """Seconds, bytes above the inputs, the loss, and the norm of the hidden states' gradient."""
    arguments = map(str, (POSITIONS, HIDDEN, VOCABULARY, int(chunked), int(learns)))
    done = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True)
    return tuple(float(each) for each in done.stdout.split())
