"""A short check of network and storage before the first step of an attempt at training.

Every attempt measures again: after a restart, the workers may be on other nodes. The figures go to
the log, the metrics and the grace period of the next attempt. Training continues when they are low, and when the
storage cannot be measured.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from internvl_api.constants import MEASURING
from internvl_api.memory.step_time import network_warning
from internvl_api.status import Bandwidth

from internvl_trainer.all_reduce import timed_all_reduce
from internvl_trainer.artifacts.fenced_storage import check_epoch
from internvl_trainer.artifacts.output_layout import BANDWIDTH
from internvl_trainer.artifacts.storage_speed import measure_speed, rate_words
from internvl_trainer.distributed import Group
from internvl_trainer.errors import LeaseLost, UserError
from internvl_trainer.run_context import GroupContext

logger = logging.getLogger(__name__)

_GROWTH = 8  # largest ratio of a measurement's size to that of the one before


class Size(NamedTuple):
    """Limits of a measurement: MiB of each rank's buffer or file, and seconds for all sizes together."""

    megabytes: int
    seconds: float


_ALL_REDUCE = {"cpu": Size(4, 0.3), "cuda": Size(512, 8)}  # NCCL reaches its full rate with half a GiB
_STORAGE = {"cpu": Size(1, 0.3), "cuda": Size(64, 8)}


def check_bandwidth(context: GroupContext) -> Bandwidth | None:
    """Measure, report and log the bandwidths. All ranks call it; None for one process, or where it is turned off.

    A storage that cannot be measured is logged and left out.

    Raises:
        LeaseLost: another attempt has taken the output.
        RuntimeError: the sum of an all-reduce is wrong, as the gradients would be.
    """
    config, group = context.config, context.group
    if group.world_size == 1 or config.network.bandwidth_check is False:
        return None
    context.reporter.doing(MEASURING)
    began = time.monotonic()
    reduced = _measure_all_reduce(group, _ALL_REDUCE[group.device.type])
    stored = _measure_storage(context, _STORAGE[group.device.type])
    write, read = stored or (None, None)
    found = bandwidth(all_reduce=reduced, storage_write=write, storage_read=read)
    report(context, found)
    if group.leads:
        logger.info("%s", describe(found, group.world_size, context.storage.uri, time.monotonic() - began))
        if warning := network_warning(config, reduced):
            logger.warning("%s", warning)
    return found


def report(context: GroupContext, found: Bandwidth) -> None:
    """Set the bandwidths in metrics and /progress; those that `found` lacks keep their earlier figures."""
    known = context.reporter.progress.bandwidth or Bandwidth()
    merged = known.model_copy(update=found.model_dump(exclude_none=True))
    context.reporter.bandwidth.set(merged)
    context.reporter.update(bandwidth=merged)


def bandwidth(**rates: float | None) -> Bandwidth:
    """The rates in whole bytes per second, without those that are None or below 1."""
    return Bandwidth(**{name: float(round(rate)) for name, rate in rates.items() if rate and rate >= 1})


def describe(found: Bandwidth, processes: int, place: str, seconds: float) -> str:
    """One line for the log."""
    parts = []
    if found.all_reduce:
        parts.append(f"all-reduce {rate_words(found.all_reduce)} over {processes} processes")
    if found.storage_write and found.storage_read:
        write, read = rate_words(found.storage_write), rate_words(found.storage_read)
        parts.append(f"each node writes {write} to {place} and reads {read} from it")
    return f"bandwidth: {'; '.join(parts) or 'nothing could be measured'} (measured in {seconds:.1f} s)"


def next_size(megabytes: int, most: int, seconds: float, left: float) -> int | None:
    """MiB of the next measurement: up to eight times as many, if that fits into `left` seconds; else None.

    Args:
        seconds: that the one of `megabytes` took.
    """
    larger = min(_GROWTH * megabytes, most)
    return larger if larger > megabytes and seconds * larger / megabytes <= left else None


def _measure_all_reduce(group: Group, size: Size) -> float:
    """Bytes per second of bus bandwidth, on the slowest rank; the first collective, which connects, does not count."""
    timed_all_reduce(str(group.device), group.rank, group.world_size, 1)

    def measure(megabytes: int) -> list[float]:
        return [timed_all_reduce(str(group.device), group.rank, group.world_size, megabytes)]

    (rate,) = _grow(group, size, measure)
    if group.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(group.device)
    return rate


def _measure_storage(context: GroupContext, size: Size) -> tuple[float, float] | None:
    """Bytes per second that the slowest node writes and reads while all ranks do; None when a rank cannot."""
    group, storage = context.group, context.storage
    epoch = group.first(context.epoch)
    folder = f"{BANDWIDTH}/{group.first(secrets.token_hex(8))}"
    problem = None

    def remove_what_a_killed_attempt_left() -> None:
        storage.drop_unfinished(f"{BANDWIDTH}/")
        storage.delete(f"{BANDWIDTH}/")

    if group.leads:
        problem = _tried(remove_what_a_killed_attempt_left)
    if group.first(problem):
        _tell(group, problem)
        return None
    errors: list[str] = []

    def measure(megabytes: int) -> list[float]:
        speed: list[float] = [0.0, 0.0]

        def send_and_receive() -> None:
            if not group.leads:
                check_epoch(storage, epoch)
            speed[:] = measure_speed(storage, f"{folder}/{group.rank:06d}", megabytes)

        problem = _tried(send_and_receive)
        errors.extend([problem] if problem else [])
        return speed

    write, read = _grow(group, size, measure)
    # Only after all ranks have written: in a file system, one rank's removal would take the others' folder away.
    if group.leads and (left := _tried(lambda: storage.delete(f"{folder}/"))):
        logger.warning("%s/%s was not removed; the next attempt tries again: %s", storage.uri, folder, left)
    if not write or not read:
        _tell(group, errors[0] if errors else None)
        return None
    processes = context.config.processes_per_worker
    return write * processes, read * processes


def _grow(group: Group, size: Size, measure: Callable[[int], Sequence[float]]) -> list[float]:
    """The slowest rank's rates in the largest measurement that there is time for; a rate of 0 ends it."""
    megabytes, began = 1, time.monotonic()
    while True:
        group.barrier()
        last = time.monotonic()
        mine = [*measure(megabytes)]
        now = time.monotonic()
        ranks = group.gather([mine, now - last, now - began])
        rates = [min(each) for each in zip(*(rank[0] for rank in ranks), strict=True)]
        took, spent = max(rank[1] for rank in ranks), max(rank[2] for rank in ranks)
        larger = next_size(megabytes, size.megabytes, took, size.seconds - spent)
        if larger is None or not all(rates):
            return rates
        megabytes = larger


def _tried(work: Callable[[], Any]) -> str | None:
    """Why the work failed; None when it did not. Raises LeaseLost."""
    try:
        work()
    except LeaseLost:
        raise
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def _tell(group: Group, problem: str | None) -> None:
    """Log each rank's problem on rank 0."""
    for rank, found in enumerate(group.gather(problem)):
        if found and group.leads:
            logger.warning("the storage's bandwidth was not measured: rank %d: %s", rank, found)
