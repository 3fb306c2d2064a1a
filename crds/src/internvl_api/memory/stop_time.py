"""How long a worker needs to stop, at most: one step, and storing its node's share of a checkpoint.

A stop waits for the current micro batch alone. The sum has a whole step, which is never less.
"""

import math

from internvl_api.memory.setup import Setup, setup_on_gpus
from internvl_api.memory.step_time import step_seconds
from internvl_api.run_config import RunConfig

# A checkpoint has three fp32 numbers for each trained parameter: weight, first and second moment of AdamW.
CHECKPOINT_BYTES = 12
# Bytes that one node stores in object storage in a second, until a run has measured it.
STORAGE_RATE = 1e9
# To notice the signal, to gather the manifest, and to end.
_MARGIN_SECONDS = 30

DEFAULT_GRACE_SECONDS = 120
"""Grace period of a worker whose stop is not estimated, and the least of one whose is."""
LONGEST_GRACE_SECONDS = 3600
"""The longest grace period that a spec may have. A stop that needs longer loses the steps since the last checkpoint."""


def checkpoint_bytes(setup: Setup) -> int:
    """Bytes of a whole checkpoint, over all ranks."""
    return CHECKPOINT_BYTES * setup.trainable_parameters


def checkpoint_share(setup: Setup, nodes: int) -> int:
    """Bytes of a checkpoint that one node holds and stores."""
    return -(-checkpoint_bytes(setup) // nodes)


def stop_seconds(setup: Setup, nodes: int, storage_rate: float = STORAGE_RATE) -> int:
    """Seconds from SIGTERM to the end of a training worker that saves a checkpoint: its grace period at least.

    Args:
        nodes: workers, each on a node of its own.
        storage_rate: bytes that one node stores in a second.
    """
    return math.ceil(step_seconds(setup) + checkpoint_share(setup, nodes) / storage_rate) + _MARGIN_SECONDS


def stop_words(setup: Setup, nodes: int, measured: float | None = None) -> str:
    """How `stop_seconds` is computed, as text for messages; `measured`: the storage rate that a run has measured."""
    share, rate = checkpoint_share(setup, nodes), measured or STORAGE_RATE
    return (
        f"{step_seconds(setup):.0f} s for one step + {share / 1e9:.0f} GB of a checkpoint at "
        f"{'the measured ' if measured else ''}{rate / 1e9:.3g} GB/s = {share / rate:.0f} s + {_MARGIN_SECONDS} s"
    )


def estimated_stop(config: RunConfig, measured: float | None = None) -> tuple[int, str] | None:
    """Seconds that a training worker needs to stop, and their sum as text.

    None without training, on the CPU, and for a model without dimensions.

    Args:
        measured: bytes that a node of this run stores in a second; None before it is measured.
    """
    setup = setup_on_gpus(config) if config.trains else None
    if setup is None:
        return None
    seconds = stop_seconds(setup, config.workers, measured or STORAGE_RATE)
    return seconds, stop_words(setup, config.workers, measured)


def grace_seconds(given: int | None, config: RunConfig, measured: float | None = None) -> int:
    """The grace period of a training worker: the one that the spec gives, else what a stop needs.

    A storage that was measured faster than STORAGE_RATE does not shorten it: a few seconds of a measurement can be
    faster than a whole checkpoint, and a grace period that is too long costs nothing.
    """
    if given is not None:
        return given
    seconds, _ = estimated_stop(config, min(measured, STORAGE_RATE) if measured else None) or (0, "")
    return min(max(seconds, DEFAULT_GRACE_SECONDS), LONGEST_GRACE_SECONDS)
