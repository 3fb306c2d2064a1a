"""The ranks of a run: rendezvous, process environment, and communication between them."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_api.constants import MASTER_PORT
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential

from internvl_trainer.errors import Unavailable
from internvl_trainer.host_memory import give_memory_back

if TYPE_CHECKING:
    import torch

# For the collectives of a step; longer than any difference between ranks in one step.
_STEP_TIMEOUT = timedelta(minutes=15)
# Around downloads and checkpoints, where ranks differ much. A peer that dies ends the wait at once, because its
# connection closes.
_SLOW_TIMEOUT = timedelta(hours=4)
# Of the meeting of all ranks before each step but the first: a rank whose data do not come ends the attempt, which
# then starts again from the newest checkpoint, instead of holding every GPU.
_MEETING_SECONDS = 120.0
ENV_MEETING_SECONDS = "INTERNVL_MEETING_SECONDS"
_RENDEZVOUS_SECONDS = 600.0
_RECORDED_COLLECTIVES = 2000  # of each rank
FLIGHT_PREFIX = "nccl-rank-"


@dataclass(frozen=True)
class Rendezvous:
    """Address, size and rank, as the operator or the local launcher sets them in the environment."""

    master_addr: str
    master_port: int
    world_size: int
    rank: int
    local_rank: int
    processes: int  # on this machine or pod

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rendezvous:
        """RANK is the first process's of a pod, or with LOCAL_RANK present that of this process."""
        return cls(
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environment.get("MASTER_PORT") or (MASTER_PORT if "MASTER_ADDR" in environment else 0)),
            world_size=int(environment.get("WORLD_SIZE", "1")),
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            processes=int(environment.get("PET_NPROC_PER_NODE", "1")),
        )

    def environment(self, local_rank: int) -> dict[str, str]:
        """The variables of the process with that local rank on this machine."""
        return {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "WORLD_SIZE": str(self.world_size),
            "RANK": str(self.rank - self.local_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "PET_NPROC_PER_NODE": str(self.processes),
        }


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def prepare_environment(device: str, processes: int) -> None:
    """Settings that torch, DeepSpeed and transformers read while they are imported.

    Every cache goes to the temporary folder: the root filesystem may be read-only and the user without a name.
    """
    caches = Path(tempfile.gettempdir()) / "caches"
    defaults = {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCH_EXTENSIONS_DIR": str(caches / "extensions"),
        "MPLCONFIGDIR": str(caches / "matplotlib"),
        "HF_HOME": str(caches / "huggingface"),
        "USER": "trainer",  # getpass.getuser() fails for a uid without a name
        "TOKENIZERS_PARALLELISM": "false",  # worker processes are the parallelism
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **_recorder_environment(),
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // processes)),
    }
    if device == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
        defaults["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # Flat batches differ in length: blocks that grow leave less memory unused between them.
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def flight_folder() -> Path:
    """Where the ranks of this machine record their collectives; deleted with the pod."""
    return Path(tempfile.gettempdir()) / "flight-recorder"


def _recorder_environment() -> dict[str, str]:
    """What makes torch record NCCL's collectives, and write them when one times out.

    Source: torch 2.13, FlightRecorder.hpp and ProcessGroupNCCL.hpp.
    """
    return {
        "TORCH_FR_BUFFER_SIZE": str(_RECORDED_COLLECTIVES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(flight_folder() / FLIGHT_PREFIX),  # torch appends the rank
    }


def usable_cpus() -> int:
    """Processors this process may use: its affinity, and the cgroup's quota where there is one."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return count


def wait_for_master(rendezvous: Rendezvous) -> None:
    """Wait until the master's name resolves: its pod may start after this one. Raises Unavailable."""
    limit = float(os.environ.get("INTERNVL_RENDEZVOUS_SECONDS", _RENDEZVOUS_SECONDS))

    @retry(
        retry=retry_if_exception_type(OSError),
        wait=wait_exponential(multiplier=0.2, max=5),
        stop=stop_after_delay(limit),
        reraise=True,
    )
    def look_up() -> None:
        socket.getaddrinfo(rendezvous.master_addr, rendezvous.master_port)

    try:
        look_up()
    except OSError as error:
        raise Unavailable(
            "RendezvousTimeout",
            f"rank {rendezvous.rank} could not resolve {rendezvous.master_addr!r} within {limit:.0f} s ({error}); "
            "is the first worker running, and does its headless Service exist?",
        ) from error


class Group:
    """All ranks of a run. Small data travel over gloo, as JSON and float64 tensors; tensors over the engine's group."""

    def __init__(
        self, rank: int, world_size: int, local_rank: int, device: torch.device, control: Any, meeting: Any = None
    ) -> None:
        self.rank, self.world_size, self.local_rank, self.device = rank, world_size, local_rank, device
        self._control, self._meeting = control, meeting

    @property
    def leads(self) -> bool:
        """True on the rank that writes manifests and reports."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over all ranks, in float64. Waits for hours: ranks differ around downloads and files."""
        return _sum(values, self._control)

    def any(self, flag: bool) -> bool:
        """Whether it is true on a rank. All ranks call it; it waits as `sum` does."""
        return self.sum([flag])[0] > 0

    def meet(self, values: Sequence[float], *, patient: bool = False) -> list[float]:
        """As `sum`, before a step: a rank that does not come within two minutes ends the attempt.

        Args:
            patient: wait for hours, as `sum` does: for steps in which data workers start or ranks have stored files.
        """
        return _sum(values, self._control if patient or self._meeting is None else self._meeting)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks, on every rank."""
        import torch

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        pieces = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        torch.distributed.all_gather(pieces, padded, group=self._control)
        return [json.loads(bytes(piece[: int(size)].numpy())) for piece, size in zip(pieces, sizes, strict=True)]

    def first(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.leads else None)[0]

    def neighbours(self, size: int) -> Any:
        """torch's process group of the `size` consecutive ranks that this rank is among. All ranks call it."""
        import torch

        starts = range(0, self.world_size, size)
        groups = [
            torch.distributed.new_group(list(range(start, start + size)), timeout=_STEP_TIMEOUT) for start in starts
        ]
        return groups[self.rank // size]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.sum([0.0])


def _sum(values: Sequence[float], group: Any) -> list[float]:
    import torch

    tensor = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, group=group)
    result: list[float] = tensor.tolist()
    return result


def join_group(rendezvous: Rendezvous, device: str) -> Group:
    """Join the other ranks. Raises Unavailable when they do not come in time."""
    wait_for_master(rendezvous)
    import torch

    from internvl_trainer.import_deepspeed import deepspeed

    if device == "cpu":
        # DeepSpeed compiles its ops on first use, which takes minutes and a compiler; gloo needs none.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        give_memory_back()
    else:
        # Slurm may show each process only its own GPU, as number 0.
        index = rendezvous.local_rank % max(1, torch.cuda.device_count())
        torch.cuda.set_device(index)
    os.environ.update(rendezvous.environment(rendezvous.local_rank))
    if rendezvous.master_port == 0:
        os.environ["MASTER_PORT"] = str(free_port())
    try:
        deepspeed.init_distributed(
            dist_backend="gloo" if device == "cpu" else "nccl",
            auto_mpi_discovery=False,
            timeout=_STEP_TIMEOUT,
            verbose=False,
        )
        control = torch.distributed.new_group(backend="gloo", timeout=_SLOW_TIMEOUT)
        seconds = float(os.environ.get(ENV_MEETING_SECONDS, _MEETING_SECONDS))
        meeting = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError) as error:
        raise Unavailable(
            "RendezvousTimeout",
            f"rank {rendezvous.rank} of {rendezvous.world_size} did not meet the others at "
            f"{rendezvous.master_addr}:{rendezvous.master_port}: {error}; do all workers run?",
        ) from error
    where = torch.device("cpu") if device == "cpu" else torch.device("cuda", index)
    return Group(rendezvous.rank, rendezvous.world_size, rendezvous.local_rank, where, control, meeting)
