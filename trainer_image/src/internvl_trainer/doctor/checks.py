"""The rows of `doctor`: what was found, how good that is, and the next step. Pure: decides over measured values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from internvl_api.quantity import GIB, gib

from internvl_trainer.artifacts.storage_speed import rate_words
from internvl_trainer.doctor.expectations import Expectations
from internvl_trainer.doctor.machine import AllReduce, Gpu, Kernel, Machine, Problem

Level = Literal["pass", "warning", "failure", "skipped"]

MIB = 1024**2
_BUSY = 2 * GIB  # of a GPU's memory; a driver and a display take less
_BF16_CAPABILITY = (8, 0)  # Ampere, the first with bf16 tensor cores
_KERNEL_ERROR = 2e-2  # bf16 has 8 bits of mantissa: 2**-8 for each rounding, and a softmax and a sum of several
_SLOW_NETWORK = 1.25e9  # bytes per second between nodes
_SLOW_NVLINK, _SLOW_PCIE, _SLOW_GLOO = 100e9, 5e9, 0.1e9  # bytes per second
_SLOW_DISK, _SLOW_STORAGE = 200e6, 50e6  # bytes per second
_LITTLE_DISK = 50 * GIB  # about a checkpoint of the 8B model with its optimizer
_SKEW_WARNING, _SKEW_FAILURE = 5.0, 300.0  # seconds; S3 refuses requests of a clock 15 minutes off
_SHM_FAILURE, _SHM_WARNING = 64 * MIB, 1 * GIB  # 64 MiB is a container's default, too little for loader processes
_FILES_FAILURE, _FILES_WARNING = 1024, 4096
_LOCKED_FAILURE = 64 * MIB
_BADNESS: tuple[Level, ...] = ("pass", "skipped", "warning", "failure")
_FLAT_KERNELS = ("varlen", "flash-attn")  # all rows of a batch in one call
_UNTOLD_ERRORS, _UNTOLD_CLOCK = "the driver does not report memory errors", "the driver does not report the clock"


@dataclass(frozen=True)
class Row:
    """One line of the result; `advice` is the next step, empty for a pass."""

    name: str
    level: Level
    found: str
    advice: str = ""


def check(machine: Machine, expect: Expectations) -> list[Row]:
    """Every row, in the order of the table."""
    return [
        _driver(machine, expect),
        _torch(machine),
        _gpus(machine, expect),
        _gpu_memory(machine, expect),
        _gpu_health(machine),
        _nvlink(machine, expect),
        _bf16(machine),
        *_kernels(machine),
        _all_reduce(machine, expect),
        *([_between_workers(machine.between_workers)] if machine.between_workers else []),
        _disk(machine, expect),
        _storage(machine, expect),
        _clock(machine),
        _shared_memory(machine, expect),
        _open_files(machine),
        _locked_memory(machine),
    ]


def _driver(machine: Machine, expect: Expectations) -> Row:
    driver, built_for = machine.driver, machine.torch.cuda
    if isinstance(driver, Problem):
        return Row(
            "driver", "failure", driver.text, "run nvidia-smi on the node; restart it or install the driver anew"
        )
    if driver is None:
        level: Level = "failure" if expect.gpus else "warning"
        return Row("driver", level, "no NVIDIA driver", "without a GPU, only tiny models train in useful time")
    found = f"{driver.version}, up to CUDA {_dotted(driver.cuda)}"
    if built_for and driver.cuda[0] < built_for[0]:
        advice = (
            f"PyTorch needs CUDA {_dotted(built_for)}: update the driver, or use the image for CUDA {driver.cuda[0]}"
        )
        return Row("driver", "failure", found, advice)
    if built_for and driver.cuda < built_for:
        advice = f"older than PyTorch's CUDA {_dotted(built_for)}: it works, but kernels made at run time may not load"
        return Row("driver", "warning", found, advice)
    return Row("driver", "pass", found)


def _torch(machine: Machine) -> Row:
    torch, present = machine.torch, len(machine.gpus)
    built = f"CUDA {_dotted(torch.cuda)}" if torch.cuda else "no CUDA"
    found = f"{torch.version}, {built}, uses {torch.gpus} GPU{'' if torch.gpus == 1 else 's'}"
    if present and not torch.cuda:
        return Row("pytorch", "failure", found, f"install a PyTorch with CUDA for the {present} GPUs of this machine")
    if present and not torch.gpus:
        return Row("pytorch", "failure", found, f"the driver has {present} GPUs: check CUDA_VISIBLE_DEVICES and MIG")
    if torch.gpus < present:
        return Row("pytorch", "warning", found, f"the driver has {present} GPUs; CUDA_VISIBLE_DEVICES hides the others")
    return Row("pytorch", "pass", found)


def _gpus(machine: Machine, expect: Expectations) -> Row:
    kinds = Counter(gpu.name for gpu in machine.gpus)
    found = ", ".join(f"{count} x {name}" for name, count in kinds.items()) or "none"
    if len(machine.gpus) < expect.gpus:
        return Row("GPUs", "failure", found, f"expected {expect.gpus}: free some, or ask for fewer (run: --nproc N)")
    if len(kinds) > 1:
        return Row("GPUs", "warning", found, "all wait for the slowest in each step; use GPUs of one kind")
    return Row("GPUs", "pass" if machine.gpus else "skipped", found)


def _gpu_memory(machine: Machine, expect: Expectations) -> Row:
    name = "GPU memory"
    if not machine.gpus:
        return _without_gpu(name, f"expected {gib(expect.memory)}" if expect.memory else "")
    known = [gpu.memory for gpu in machine.gpus if gpu.memory is not None]
    if len(known) < len(machine.gpus):
        advice = f"expected {gib(expect.memory)}: drop memory from --expect for these GPUs" if expect.memory else ""
        return Row(name, "failure" if advice else "skipped", "the driver does not report it", advice)
    smallest = min(known)
    busy = {index: gpu.used for index, gpu in enumerate(machine.gpus) if gpu.used > _BUSY}
    found = f"{gib(smallest)} each" if len(machine.gpus) > 1 else gib(smallest)
    # A card sold as 80 GB reports a little less than 80 GiB.
    if smallest < expect.memory * 0.92:
        return Row(name, "failure", found, f"expected {gib(expect.memory)}")
    if busy:
        listed = ", ".join(f"GPU {index} {gib(used)}" for index, used in busy.items())
        return Row(name, "warning", f"{found}; in use: {listed}", "another process uses them: nvidia-smi names it")
    return Row(name, "pass", found)


def _gpu_health(machine: Machine) -> Row:
    name = "GPU health"
    if not machine.gpus:
        return _without_gpu(name)
    if broken := _each(machine, _broken):
        return Row(name, "failure", broken, "results can be wrong: drain the node and have the card replaced or reset")
    if suspect := _each(machine, _suspect):
        return Row(name, "warning", suspect, "reset the card before a long run; check cooling and power")
    errors = "no memory errors" if all(gpu.uncorrected is not None for gpu in machine.gpus) else _UNTOLD_ERRORS
    clock = "full clock" if all(gpu.slowed is not None for gpu in machine.gpus) else _UNTOLD_CLOCK
    return Row(name, "pass", f"{errors}, {clock}")


def _broken(gpu: Gpu) -> str:
    if gpu.remap_failed:
        return "no spare memory rows left"
    return f"{gpu.uncorrected} uncorrectable memory errors" if gpu.uncorrected else ""


def _suspect(gpu: Gpu) -> str:
    return "memory rows wait for a reset" if gpu.remap_pending else gpu.slowed or ""


def _nvlink(machine: Machine, expect: Expectations) -> Row:
    name = "NVLink"
    if not machine.gpus:
        return _without_gpu(name, f"expected {expect.nvlink} links a GPU" if expect.nvlink else "")
    if down := _each(machine, lambda gpu: f"{gpu.links_down} of {gpu.links} links down" if gpu.links_down else ""):
        return Row(name, "failure", down, "check the node's fabric manager and `nvidia-smi nvlink --status`")
    fewest = min(gpu.links for gpu in machine.gpus)
    if fewest < expect.nvlink:
        return Row(name, "failure", f"{fewest} links a GPU", f"expected {expect.nvlink}: choose another kind of node")
    if not fewest and len(machine.gpus) > 1:
        return Row(name, "warning", "none", "GPUs talk over PCIe: ZeRO-3 and full training are slower; prefer LoRA")
    return Row(name, "pass", f"{fewest} links a GPU" if fewest else "none; one GPU needs none")


def _bf16(machine: Machine) -> Row:
    name = "bf16"
    if not machine.gpus:
        if machine.cpu_bf16:
            return Row(name, "pass", "by the processor")
        return Row(name, "warning", "emulated by the processor", "rehearse with training.precision: fp32")
    lowest = min(gpu.capability for gpu in machine.gpus)
    found = f"compute capability {_dotted(lowest)}"
    if lowest < _BF16_CAPABILITY:
        return Row(name, "failure", found, "needs 8.0 or newer (A100, RTX 30): choose another GPU")
    return Row(name, "pass", found)


def _kernels(machine: Machine) -> list[Row]:
    """A row for each kernel, about the GPU where it is worst."""
    names = dict.fromkeys(each.name for each in machine.kernels)
    return [_worst([each for each in machine.kernels if each.name == name], machine) for name in names]


def _worst(kernels: list[Kernel], machine: Machine) -> Row:
    """The row of the GPU on which a kernel does worst. It names that GPU where the GPUs differ."""
    rows = [(_kernel(each, machine), each) for each in kernels]
    row, kernel = max(rows, key=lambda each: (_BADNESS.index(each[0].level), _distance(each[1])))
    if all(each == row for each, _ in rows):
        return row
    return replace(row, found=f"{kernel.device}, the worst of {len(kernels)} GPUs: {row.found}")


def _distance(kernel: Kernel) -> float:
    return math.inf if kernel.error is None or math.isnan(kernel.error) else kernel.error


def _kernel(kernel: Kernel, machine: Machine) -> Row:
    name = f"attention: {kernel.name}"
    if kernel.failure:
        return Row(name, "failure", kernel.failure, "driver, PyTorch and GPU do not fit together: see the rows above")
    if kernel.missing or kernel.error is None:
        needed = bool(machine.gpus) and not any(
            each.name in _FLAT_KERNELS and each.device == kernel.device and _distance(each) <= _KERNEL_ERROR
            for each in machine.kernels
        )
        advice = "without varlen or flash-attn, training calls sdpa once a row and is slower" if needed else ""
        return Row(name, "warning" if needed else "skipped", f"not here: {kernel.missing}", advice)
    found = f"differs from math by {kernel.error:.1e}"
    if not kernel.error <= _KERNEL_ERROR:  # also NaN
        return Row(name, "failure", found, f"expected at most {_KERNEL_ERROR:g}: the GPU or the build computes wrongly")
    return Row(name, "pass", found)


def _all_reduce(machine: Machine, expect: Expectations) -> Row:
    name, measured = "all-reduce", machine.all_reduce
    if isinstance(measured, Problem):
        return _broken_reduce(name, measured)
    if measured is None:
        advice = f"expected {rate_words(expect.allreduce)}" if expect.allreduce else ""
        return Row(name, "failure" if advice else "skipped", "one GPU: nothing to reduce", advice)
    found = _reduced(measured)
    if measured.rate < expect.allreduce:
        return Row(
            name, "failure", found, f"expected {rate_words(expect.allreduce)}: check NVLink, PCIe and NCCL_* settings"
        )
    linked = bool(machine.gpus) and min(gpu.links for gpu in machine.gpus) > 0
    usual = (_SLOW_NVLINK if linked else _SLOW_PCIE) if measured.backend == "nccl" else _SLOW_GLOO
    if measured.rate < usual:
        return Row(name, "warning", found, f"below {rate_words(usual)}: check NVLink, PCIe and NCCL_* settings")
    return Row(name, "pass", found)


def _between_workers(measured: AllReduce | Problem) -> Row:
    name = "all workers"
    if isinstance(measured, Problem):
        return _broken_reduce(name, measured)
    found = _reduced(measured)
    if measured.backend == "nccl" and measured.rate < _SLOW_NETWORK:
        advice = (
            "below 10 Gbit/s: check that NCCL uses InfiniBand or the fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
        )
        return Row(name, "warning", found, advice)
    return Row(name, "pass", found)


def _broken_reduce(name: str, problem: Problem) -> Row:
    return Row(name, "failure", problem.text, "set NCCL_DEBUG=INFO and run doctor again")


def _reduced(measured: AllReduce) -> str:
    return f"{rate_words(measured.rate)} over {measured.processes} processes ({measured.backend})"


def _disk(machine: Machine, expect: Expectations) -> Row:
    name, disk = "disk", machine.disk
    if isinstance(disk, Problem):
        return Row(name, "failure", disk.text, "set TMPDIR to a folder with room that can be written")
    found = f"{disk.path}: {gib(disk.free)} free, writes {rate_words(disk.write)}, reads {rate_words(disk.read)}"
    slower = min(disk.write, disk.read)
    if slower < expect.disk or disk.free < expect.free:
        wanted = [f"{rate_words(expect.disk)}"] * bool(expect.disk) + [f"{gib(expect.free)} free"] * bool(expect.free)
        return Row(name, "failure", found, f"expected {' and '.join(wanted)}: set TMPDIR to another disk")
    warnings = []
    if disk.free < _LITTLE_DISK:
        warnings.append("little room: models, data and checkpoints pass through it")
    if slower < _SLOW_DISK:
        warnings.append("slow: downloads and checkpoints wait for it; prefer a local SSD")
    return Row(name, "warning" if warnings else "pass", found, "; ".join(warnings))


def _storage(machine: Machine, expect: Expectations) -> Row:
    name, storage = "storage", machine.storage
    if isinstance(storage, Problem):
        return Row(name, "failure", storage.text, "check address, credentials and network policy")
    if storage is None:
        return Row(name, "failure" if expect.storage else "skipped", "not measured", "name it: --storage s3://bucket")
    found = f"{storage.uri}: sends {rate_words(storage.upload)}, receives {rate_words(storage.download)}"
    slower = min(storage.upload, storage.download)
    if slower < expect.storage:
        return Row(name, "failure", found, f"expected {rate_words(expect.storage)}")
    if slower < _SLOW_STORAGE:
        return Row(name, "warning", found, "slow: save checkpoints less often (checkpoint.everySteps)")
    return Row(name, "pass", found)


def _clock(machine: Machine) -> Row:
    name, storage = "clock", machine.storage
    if storage is None or isinstance(storage, Problem):
        return Row(name, "skipped", "not measured", "it is compared with the storage's clock: --storage s3://bucket")
    skew = abs(storage.clock_ahead)
    found = f"{skew:.1f} s {'behind' if storage.clock_ahead > 0 else 'ahead of'} the storage's"
    if skew >= _SKEW_FAILURE:
        return Row(name, "failure", found, "start chrony or ntpd: servers refuse requests with such a time")
    if skew >= _SKEW_WARNING:
        return Row(name, "warning", found, "start chrony or ntpd: times in logs and leases disagree")
    return Row(name, "pass", found)


def _shared_memory(machine: Machine, expect: Expectations) -> Row:
    name, size = "/dev/shm", machine.shared_memory
    advice = "docker: --shm-size 16g; Kubernetes: an emptyDir with medium Memory (the operator adds one)"
    if size < expect.shm:
        return Row(name, "failure", _size(size), f"expected {_size(expect.shm)}; {advice}")
    if size <= _SHM_FAILURE:
        return Row(name, "failure", _size(size), advice)
    if size < _SHM_WARNING:
        return Row(name, "warning", _size(size), advice)
    return Row(name, "pass", _size(size))


def _open_files(machine: Machine) -> Row:
    name, found = "open files", f"{machine.open_files} a process"
    if machine.open_files < _FILES_FAILURE:
        return Row(name, "failure", found, "raise it: ulimit -n 65536")
    if machine.open_files < _FILES_WARNING:
        return Row(name, "warning", found, "raise it for many loader processes: ulimit -n 65536")
    return Row(name, "pass", found)


def _locked_memory(machine: Machine) -> Row:
    name, limit = "locked memory", machine.locked_memory
    if limit is None:
        return Row(name, "pass", "unlimited")
    if not machine.infiniband:
        return Row(name, "pass", f"{_size(limit)}; no InfiniBand that needs more")
    found = f"{_size(limit)}, {machine.infiniband} InfiniBand devices"
    if limit <= _LOCKED_FAILURE:
        return Row(name, "failure", found, "NCCL cannot register memory with them: ulimit -l unlimited")
    return Row(name, "warning", found, "NCCL may run out of registered memory: ulimit -l unlimited")


def _without_gpu(name: str, expected: str = "") -> Row:
    return Row(name, "failure" if expected else "skipped", "no GPU", expected)


def _each(machine: Machine, of: Callable[[Gpu], str]) -> str:
    """`of(gpu)` for the GPUs where it says something: `GPU 3: …; GPU 5: …`."""
    told = [(index, of(gpu)) for index, gpu in enumerate(machine.gpus)]
    return "; ".join(f"GPU {index}: {text}" for index, text in told if text)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _size(amount: int) -> str:
    return gib(amount) if amount >= GIB else f"{amount / MIB:.0f} MiB"
