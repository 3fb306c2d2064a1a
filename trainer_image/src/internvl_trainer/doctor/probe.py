"""Measures the machine that this process runs on."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from internvl_trainer.doctor.all_reduce import measure_all_reduce
from internvl_trainer.doctor.bandwidth import measure_disk, measure_storage
from internvl_trainer.doctor.driver import nvml, read_driver
from internvl_trainer.doctor.machine import Kernel, Machine, TorchBuild

_CPU_PROCESSES = 2  # of the all-reduce on a machine without GPUs
_CPU_MEGABYTES, _GPU_MEGABYTES = 16, 512  # of the all-reduce; NCCL reaches its full rate with the latter
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and Arm


def measure(*, storage: str | None, megabytes: int, gpus_used: bool = True) -> Machine:
    """Measure everything once; seconds on a machine that works.

    Args:
        storage: address to send a file to; None for none.
        megabytes: size of the files for disk and storage.
        gpus_used: False for a run on the processor, which does not care for the GPUs of its node.
    """
    driver, gpus = read_driver(nvml()) if gpus_used else (None, ())
    torch = torch_build()
    device = "cuda" if torch.gpus else "cpu"
    processes = torch.gpus or _CPU_PROCESSES
    all_reduce = measure_all_reduce(device, processes, _GPU_MEGABYTES if torch.gpus else _CPU_MEGABYTES)
    return Machine(
        driver=driver,
        torch=torch,
        gpus=gpus,
        cpu_bf16=bool(_BF16_FLAGS & _cpu_flags()),
        kernels=_kernels(torch.gpus),
        all_reduce=all_reduce,
        disk=measure_disk(megabytes),
        storage=measure_storage(storage, megabytes) if storage else None,
        shared_memory=_size_of("/dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        infiniband=_count("/sys/class/infiniband"),
    )


def torch_build() -> TorchBuild:
    """PyTorch as it is installed here."""
    import torch

    built_for = torch.version.cuda
    major, minor = (int(part) for part in built_for.split(".")[:2]) if built_for else (0, 0)
    return TorchBuild(torch.__version__, (major, minor) if built_for else None, torch.cuda.device_count())


def _kernels(gpus: int) -> tuple[Kernel, ...]:
    import torch

    from internvl_trainer.doctor.kernels import measure_kernels

    return measure_kernels([torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")])


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}


def _size_of(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return 0


def _limit(which: int) -> int | None:
    value = resource.getrlimit(which)[0]
    return None if value == resource.RLIM_INFINITY else value


def _count(folder: str) -> int:
    path = Path(folder)
    return len(list(path.iterdir())) if path.is_dir() else 0
