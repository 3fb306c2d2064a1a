"""What `doctor` measures of a machine, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A measurement that failed; `text` says why."""

    text: str


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA that it knows."""

    version: str
    cuda: tuple[int, int]


@dataclass(frozen=True)
class TorchBuild:
    """PyTorch: its version, the CUDA it was built for (None: without), and the GPUs it can use."""

    version: str
    cuda: tuple[int, int] | None
    gpus: int


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it.

    Attributes:
        memory, used: bytes; None and 0 where the driver does not tell, as for memory shared with the processor.
        uncorrected: uncorrectable memory errors since the driver was loaded; None where the driver does not tell.
        remap_pending: replacing broken rows of memory needs a reset.
        remap_failed: no spare rows of memory are left.
        slowed: why the clock is held down, by heat or power; empty when it is not, None where the driver does not tell.
        links, links_down: NVLinks in all and inactive.
    """

    name: str
    memory: int | None
    used: int
    capability: tuple[int, int]
    uncorrected: int | None = 0
    remap_pending: bool = False
    remap_failed: bool = False
    slowed: str | None = ""
    links: int = 0
    links_down: int = 0


@dataclass(frozen=True)
class Kernel:
    """An attention kernel on small inputs, on one device.

    Attributes:
        device: PyTorch's name of the GPU, as cuda:3; empty on the processor.
        error: largest difference from the math path, relative to its largest value; None when it did not run.
        missing: why this machine does not have the kernel; empty when it has it.
        failure: the exception of a kernel that should run; empty when it ran.
    """

    name: str
    error: float | None = None
    missing: str = ""
    failure: str = ""
    device: str = ""


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce over `processes`; `rate`: bytes per second of bus bandwidth, as nccl-tests counts it."""

    backend: str
    processes: int
    rate: float


@dataclass(frozen=True)
class Disk:
    """The folder for temporary files: free bytes, and bytes per second written with fsync and read back."""

    path: str
    free: int
    write: float
    read: float


@dataclass(frozen=True)
class Transfer:
    """Object storage: bytes per second to it and from it, and how far its clock is ahead of ours (seconds)."""

    uri: str
    upload: float
    download: float
    clock_ahead: float


@dataclass(frozen=True)
class Machine:
    """Everything that the checks look at.

    Attributes:
        driver: None where there is no NVIDIA driver.
        cpu_bf16: whether the processor has instructions for bf16.
        kernels: each on every GPU that PyTorch uses, or on the processor.
        all_reduce: None where there was one process only.
        storage: None where none was named.
        shared_memory: bytes of /dev/shm.
        open_files: how many files a process may open.
        locked_memory: bytes that a process may lock; None without a limit.
        infiniband: number of InfiniBand devices.
        between_workers: an all-reduce over all ranks of a run with several workers; else None.
    """

    driver: Driver | Problem | None
    torch: TorchBuild
    gpus: tuple[Gpu, ...]
    cpu_bf16: bool
    kernels: tuple[Kernel, ...]
    all_reduce: AllReduce | Problem | None
    disk: Disk | Problem
    storage: Transfer | Problem | None
    shared_memory: int
    open_files: int
    locked_memory: int | None
    infiniband: int
    between_workers: AllReduce | Problem | None = None
