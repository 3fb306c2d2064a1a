"""How long training may move weights without a word: while it fetches, loads, restores, stores and exports them."""

from internvl_api.memory.setup import setup_on_gpus
from internvl_api.memory.stop_time import checkpoint_share
from internvl_api.run_config import RunConfig
from internvl_api.status import Bandwidth

# Bytes per second of a node that is slow but works: a disk that spins, or a shared file server.
SLOW_RATE = 50e6
_OTHER_SECONDS = 3600  # processes start, kernels are compiled, and a storage that fails may come back
_LONGEST_SECONDS = 86_400  # whatever a pod reports as its storage's rate


def moving_limit(config: RunConfig, measured: Bandwidth | None = None) -> tuple[float, str] | None:
    """Seconds in which one node moves the whole model and its share of a checkpoint, and their sum as text.

    It counts with a rate that is too low: SLOW_RATE, or half of what the run measured where that is less.

    None without training, on the CPU, and for a model without dimensions.

    Args:
        measured: bytes per second of the run's storage; None before it is measured.
    """
    setup = setup_on_gpus(config) if config.trains else None
    if setup is None:
        return None
    weights = setup.element_bytes * setup.model.parameters
    share = checkpoint_share(setup, config.workers)
    halves = [rate / 2 for rate in (measured.storage_read, measured.storage_write) if rate] if measured else []
    rate = min([SLOW_RATE, *halves])
    origin = "half of the measured storage rate" if rate < SLOW_RATE else "assumed at least"
    seconds = min(_OTHER_SECONDS + (weights + share) / rate, _LONGEST_SECONDS)
    text = (
        f"{_OTHER_SECONDS} s + {weights / 1e9:.1f} GB of weights and {share / 1e9:.1f} GB of a checkpoint at "
        f"{rate / 1e6:.3g} MB/s ({origin}) = {seconds:.0f} s"
    )
    return seconds, text + (", the most there is" if seconds == _LONGEST_SECONDS else "")
