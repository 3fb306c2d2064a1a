"""Which fault an exception or an aborted process is about."""

from __future__ import annotations

import errno

import pytest
import torch
from internvl_trainer.faults import diagnose, diagnose_abort, explain, is_gpu_out_of_memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB")
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.1]:5")
BROKEN = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECC' in https")
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegal")


def raised(error: Exception, *, cause: BaseException | None = None, context: BaseException | None = None) -> Exception:
    error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


def missing(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "No such file or directory", name)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(FULL, "GpuOutOfMemory", id="as it is"),
        pytest.param(raised(ValueError("step 7"), cause=FULL), "GpuOutOfMemory", id="behind another"),
        pytest.param(raised(RuntimeError("cannot close"), context=BROKEN), "GpuHardwareError", id="while cleaning up"),
        pytest.param(raised(RuntimeError("Broken pipe"), context=FULL), "GpuOutOfMemory", id="and then the peer left"),
        pytest.param(raised(RuntimeError("x"), cause=LOST), "PeerLost", id="only a lost peer"),
        pytest.param(MemoryError(), "OutOfMemory", id="Python's memory"),
        pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), "OutOfMemory", id="fork"),
        pytest.param(
            OSError(errno.ENOMEM, "Cannot allocate memory", "/data/a.jpg"), "OutOfMemory", id="mmap of a file"
        ),
        pytest.param(missing("/data/Connection reset by peer"), None, id="a file's name"),
        pytest.param(missing("/data/x: CUDA error: out of memory"), None, id="another file's name"),
        pytest.param(KeyError("out of memory"), None, id="a key"),
        pytest.param(RuntimeError("shapes differ"), None, id="a mistake"),
    ],
)
def test_the_fault_behind_an_exception(error: Exception, reason: str | None) -> None:
    found = diagnose(error)
    assert (found and found.fault.reason) == reason


def test_a_chain_of_exceptions_that_ends_in_itself() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert diagnose(one) is None


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        pytest.param(
            "WARNING cannot decode: CUDA error: out of memory\n"
            "[rank3]:[E1129 ProcessGroupNCCL.cpp:2057] [PG ID 0 PG GUID 0(default_pg) Rank 3] Process group watchdog "
            "thread terminated with exception: CUDA error: an illegal memory access was encountered\nSearch for `cuda",
            "GpuFault",
            id="watchdog",
        ),
        pytest.param(
            "terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  [PG ID 0 PG GUID "
            "0(default_pg) Rank 3] Process group watchdog thread terminated with exception: CUDA error: uncorrectable "
            "ECC error encountered\nSearch for `cudaErrorECC",
            "GpuHardwareError",
            id="terminate",
        ),
        pytest.param(
            "[rank0]:[E1129 ProcessGroupNCCL.cpp:688] [Rank 0] Watchdog caught collective operation timeout: "
            "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600026 ms",
            "PeerLost",
            id="timeout",
        ),
        pytest.param("WARNING cannot decode: CUDA error: out of memory\nFatal Python error: Aborted", None, id="log"),
        pytest.param("", None, id="nothing"),
    ],
)
def test_the_fault_of_an_aborted_process(printed: str, reason: str | None) -> None:
    found = diagnose_abort(printed)
    assert (found and found.fault.reason) == reason


def test_a_message_says_which_rank_what_and_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "12")
    found = diagnose(ILLEGAL)
    assert found is not None
    assert explain(found).startswith(
        "rank 12: torch.AcceleratorError: CUDA error: an illegal memory access was encountered; a broken GPU, its "
    )
    monkeypatch.delenv("RANK")
    assert explain(found).startswith("torch.AcceleratorError: ")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), False),
        (ILLEGAL, False),
    ],
)
def test_only_a_full_gpu_can_take_a_smaller_batch(error: Exception, full: bool) -> None:
    assert is_gpu_out_of_memory(error) is full
