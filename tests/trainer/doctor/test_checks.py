"""Each row of `doctor`: a pass, a warning and a failure, and what `--expect` adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from internvl_api.quantity import GIB
from internvl_trainer.doctor.checks import Level, check
from internvl_trainer.doctor.expectations import Expectations, parse_expectations
from internvl_trainer.doctor.machine import AllReduce, Disk, Driver, Gpu, Kernel, Machine, Problem, TorchBuild, Transfer

H100 = Gpu("NVIDIA H100", 80 * GIB, GIB, (9, 0), links=18)
HEALTHY = Machine(
    driver=Driver("580.65.06", (13, 0)),
    torch=TorchBuild("2.13.0", (13, 0), 2),
    gpus=(H100, H100),
    cpu_bf16=True,
    kernels=(Kernel("varlen", error=4e-3),),
    all_reduce=AllReduce("nccl", 2, 300e9),
    disk=Disk("/scratch", 500 * GIB, 2e9, 3e9),
    storage=Transfer("s3://bucket", 1e9, 1e9, 0.2),
    shared_memory=16 * GIB,
    open_files=65536,
    locked_memory=None,
    infiniband=0,
    between_workers=AllReduce("nccl", 4, 40e9),
)


def gpus(*changes: Mapping[str, Any]) -> tuple[Gpu, ...]:
    return tuple(replace(H100, **change) for change in changes)


def varlen(*changes: Mapping[str, Any]) -> tuple[Kernel, ...]:
    """The kernel on one GPU each."""
    return tuple(Kernel("varlen", device=f"cuda:{index}", **change) for index, change in enumerate(changes))


def row(name: str, level: Level, says: str, expect: str = "", **changes: Any) -> Any:
    return pytest.param(name, level, says, expect, changes, id=f"{name}-{level}-{says}")


ONE_GPU = {"gpus": (H100,), "torch": TorchBuild("2.13.0", (13, 0), 1)}
NO_GPU = {"driver": None, "gpus": (), "torch": TorchBuild("2.13.0", (13, 0), 0), "all_reduce": None}
LINKLESS = {"gpus": gpus({"links": 0}, {"links": 0})}
ROWS = [
    row("driver", "pass", "580.65.06, up to CUDA 13.0"),
    row("driver", "warning", "580.65.06, up to CUDA 13.0", torch=TorchBuild("2.14.0", (13, 2), 2)),
    row("driver", "warning", "no NVIDIA driver", **NO_GPU),
    row("driver", "failure", "no NVIDIA driver", "gpus=8", **NO_GPU),
    row("driver", "failure", "550.54, up to CUDA 12.4", driver=Driver("550.54", (12, 4))),
    row("driver", "failure", "GPU is lost", driver=Problem("a GPU does not answer: GPU is lost"), gpus=()),
    row("pytorch", "pass", "CUDA 13.0, uses 2 GPUs"),
    row("pytorch", "warning", "uses 1 GPU", torch=TorchBuild("2.13.0", (13, 0), 1)),
    row("pytorch", "failure", "uses 0 GPUs", torch=TorchBuild("2.13.0", (13, 0), 0)),
    row("pytorch", "failure", "no CUDA", torch=TorchBuild("2.13.0+cpu", None, 0)),
    row("GPUs", "pass", "2 x NVIDIA H100"),
    row("GPUs", "skipped", "none", **NO_GPU),
    row("GPUs", "warning", "1 x NVIDIA H100, 1 x NVIDIA A100", gpus=gpus({}, {"name": "NVIDIA A100"})),
    row("GPUs", "failure", "2 x NVIDIA H100", "gpus=8"),
    row("GPU memory", "pass", "80.0 GiB each", "memory=80Gi"),
    row("GPU memory", "pass", "79.2 GiB", "memory=80Gi", **{**ONE_GPU, "gpus": gpus({"memory": int(79.2 * GIB)})}),
    row("GPU memory", "warning", "in use: GPU 1 30.0 GiB", gpus=gpus({}, {"used": 30 * GIB})),
    row("GPU memory", "failure", "40.0 GiB each", "memory=80Gi", gpus=gpus({}, {"memory": 40 * GIB})),
    row("GPU memory", "failure", "no GPU", "memory=80Gi", **NO_GPU),
    row("GPU memory", "skipped", "does not report it", gpus=gpus({}, {"memory": None})),
    row("GPU memory", "failure", "does not report it", "memory=80Gi", gpus=gpus({}, {"memory": None})),
    row("GPU health", "pass", "no memory errors"),
    row("GPU health", "pass", "no memory errors, the driver does not report the clock", gpus=gpus({"slowed": None})),
    row("GPU health", "warning", "GPU 1: slowed by heat", gpus=gpus({}, {"slowed": "slowed by heat"})),
    row("GPU health", "warning", "GPU 0: memory rows wait for a reset", gpus=gpus({"remap_pending": True}, {})),
    row("GPU health", "failure", "GPU 1: 3 uncorrectable memory errors", gpus=gpus({}, {"uncorrected": 3})),
    row("GPU health", "failure", "GPU 0: no spare memory rows left", gpus=gpus({"remap_failed": True}, {})),
    row("NVLink", "pass", "18 links a GPU", "nvlink=18"),
    row("NVLink", "pass", "one GPU needs none", **{**ONE_GPU, "gpus": gpus({"links": 0})}),
    row("NVLink", "warning", "none", **LINKLESS),
    row("NVLink", "failure", "0 links a GPU", "nvlink=18", **LINKLESS),
    row("NVLink", "failure", "GPU 1: 2 of 18 links down", gpus=gpus({}, {"links_down": 2})),
    row("bf16", "pass", "compute capability 9.0"),
    row("bf16", "pass", "by the processor", **NO_GPU),
    row("bf16", "warning", "emulated by the processor", **NO_GPU, cpu_bf16=False),
    row("bf16", "failure", "compute capability 7.5", gpus=gpus({}, {"capability": (7, 5)})),
    row("attention: varlen", "pass", "differs from math by 4.0e-03"),
    row("attention: varlen", "warning", "not here: needs a GPU", kernels=(Kernel("varlen", missing="needs a GPU"),)),
    row("attention: varlen", "skipped", "not here", kernels=(Kernel("varlen", missing="needs a GPU"),), **NO_GPU),
    row("attention: varlen", "failure", "differs from math by 5.0e-01", kernels=(Kernel("varlen", error=0.5),)),
    row("attention: varlen", "failure", "by nan", kernels=(Kernel("varlen", error=float("nan")),)),
    row("attention: varlen", "failure", "illegal address", kernels=(Kernel("varlen", failure="illegal address"),)),
    row("attention: varlen", "pass", "differs from math by 4.0e-03", kernels=varlen({"error": 4e-3}, {"error": 4e-3})),
    row(
        "attention: varlen",
        "failure",
        "cuda:1, the worst of 3 GPUs: differs from math by 5.0e-01",
        kernels=varlen({"error": 4e-3}, {"error": 0.5}, {"error": 0.3}),
    ),
    row(
        "attention: varlen",
        "failure",
        "cuda:1, the worst of 2 GPUs: differs from math by nan",
        kernels=varlen({"error": 0.5}, {"error": float("nan")}),
    ),
    row(
        "attention: varlen",
        "warning",
        "cuda:1, the worst of 2 GPUs: not here: only supports Ampere",
        kernels=varlen({"error": 4e-3}, {"missing": "only supports Ampere"}),
    ),
    row(
        "attention: varlen",
        "failure",
        "cuda:0, the worst of 2 GPUs: illegal address",
        kernels=varlen({"failure": "illegal address"}, {"missing": "needs a GPU"}),
    ),
    row("all-reduce", "pass", "300.0 GB/s over 2 processes (nccl)", "allreduce=200GB"),
    row("all-reduce", "pass", "20.0 GB/s", **LINKLESS, all_reduce=AllReduce("nccl", 2, 20e9)),
    row("all-reduce", "skipped", "one GPU", **ONE_GPU, all_reduce=None),
    row("all-reduce", "warning", "20.0 GB/s", all_reduce=AllReduce("nccl", 2, 20e9)),
    row("all-reduce", "warning", "50 MB/s", **{**NO_GPU, "all_reduce": AllReduce("gloo", 2, 50e6)}),
    row("all-reduce", "failure", "300.0 GB/s", "allreduce=400GB"),
    row("all-reduce", "failure", "nccl: no route", all_reduce=Problem("nccl: no route")),
    row("all workers", "pass", "40.0 GB/s over 4 processes (nccl)"),
    row("all workers", "warning", "100 MB/s", between_workers=AllReduce("nccl", 4, 100e6)),
    row("all workers", "failure", "nccl: wrong sum", between_workers=Problem("nccl: wrong sum")),
    row("disk", "pass", "/scratch: 500.0 GiB free, writes 2.0 GB/s, reads 3.0 GB/s", "disk=1GB,free=100Gi"),
    row("disk", "warning", "20.0 GiB free", disk=Disk("/tmp", 20 * GIB, 2e9, 3e9)),
    row("disk", "warning", "writes 90 MB/s", disk=Disk("/tmp", 500 * GIB, 90e6, 3e9)),
    row("disk", "failure", "writes 2.0 GB/s", "disk=3GB"),
    row("disk", "failure", "500.0 GiB free", "free=1Ti"),
    row("disk", "failure", "Read-only file system", disk=Problem("/tmp: Read-only file system")),
    row("storage", "pass", "s3://bucket: sends 1.0 GB/s", "storage=500MB"),
    row("storage", "skipped", "not measured", storage=None),
    row("storage", "warning", "receives 20 MB/s", storage=Transfer("s3://bucket", 1e9, 20e6, 0.0)),
    row("storage", "failure", "sends 1.0 GB/s", "storage=2GB"),
    row("storage", "failure", "not measured", "storage=2GB", storage=None),
    row("storage", "failure", "AccessDenied", storage=Problem("AccessDenied")),
    row("clock", "pass", "0.2 s behind the storage's"),
    row("clock", "skipped", "not measured", storage=Problem("AccessDenied")),
    row("clock", "warning", "40.0 s ahead of", storage=Transfer("s3://bucket", 1e9, 1e9, -40.0)),
    row("clock", "failure", "400.0 s behind", storage=Transfer("s3://bucket", 1e9, 1e9, 400.0)),
    row("/dev/shm", "pass", "16.0 GiB"),
    row("/dev/shm", "warning", "512 MiB", shared_memory=512 * 2**20),
    row("/dev/shm", "failure", "64 MiB", shared_memory=64 * 2**20),
    row("/dev/shm", "failure", "16.0 GiB", "shm=32Gi"),
    row("open files", "pass", "65536"),
    row("open files", "warning", "1024", open_files=1024),
    row("open files", "failure", "256", open_files=256),
    row("locked memory", "pass", "unlimited"),
    row("locked memory", "pass", "8 MiB; no InfiniBand", locked_memory=8 * 2**20),
    row("locked memory", "warning", "16.0 GiB, 4 InfiniBand devices", locked_memory=16 * GIB, infiniband=4),
    row("locked memory", "failure", "8 MiB, 4 InfiniBand devices", locked_memory=8 * 2**20, infiniband=4),
]


@pytest.mark.parametrize(("name", "level", "says", "expect", "changes"), ROWS)
def test_row(name: str, level: Level, says: str, expect: str, changes: Mapping[str, Any]) -> None:
    rows = check(replace(HEALTHY, **changes), parse_expectations(expect))
    (found,) = [each for each in rows if each.name == name]
    assert (found.level, says in found.found) == (level, True), found
    assert bool(found.advice) or level in ("pass", "skipped")


def test_every_row_has_a_pass_a_warning_and_a_failure() -> None:
    names = {each.name for each in check(HEALTHY, Expectations())}
    seen = {(param.values[0], param.values[1]) for param in ROWS}
    assert {(name, level) for name in names for level in ("pass", "warning", "failure")} <= seen


def test_a_healthy_machine_passes_everything() -> None:
    assert {each.level for each in check(HEALTHY, Expectations())} == {"pass"}


def test_one_worker_has_no_row_for_all_workers() -> None:
    rows = check(replace(HEALTHY, between_workers=None), Expectations())
    assert {each.name for each in check(HEALTHY, Expectations())} - {each.name for each in rows} == {"all workers"}


@pytest.mark.parametrize(("works", "missing"), [("varlen", "flash-attn"), ("flash-attn", "varlen")])
def test_a_missing_kernel_is_no_warning_where_a_kernel_for_all_rows_works(works: str, missing: str) -> None:
    kernels = (Kernel(works, error=1e-3), Kernel(missing, missing="No module named 'x'"))
    rows = check(replace(HEALTHY, kernels=kernels), Expectations())
    assert [each.level for each in rows if each.name == f"attention: {missing}"] == ["skipped"]


def test_a_kernel_that_computes_wrongly_replaces_no_missing_one() -> None:
    kernels = (Kernel("varlen", error=0.5), Kernel("flash-attn", missing="No module named 'flash_attn'"))
    rows = check(replace(HEALTHY, kernels=kernels), Expectations())
    assert [each.level for each in rows if each.name == "attention: flash-attn"] == ["warning"]


def test_a_small_and_slow_disk_is_told_as_both() -> None:
    rows = check(replace(HEALTHY, disk=Disk("/tmp", 20 * GIB, 39e6, 3e9)), Expectations())
    (advice,) = [each.advice for each in rows if each.name == "disk"]
    assert "little room: " in advice
    assert "slow: " in advice


def test_too_little_shared_memory_is_told_with_the_bound() -> None:
    rows = check(HEALTHY, parse_expectations("shm=1Ti"))
    (advice,) = [each.advice for each in rows if each.name == "/dev/shm"]
    assert advice.startswith("expected 1024.0 GiB; docker: --shm-size")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu=8", "found 'gpu=8', expected NAME=VALUE with one of the names gpus, memory"),
        ("gpus", "found 'gpus', expected NAME=VALUE"),
        ("gpus=eight", "gpus: found 'eight', expected a number"),
        ("memory=big", "memory: found 'big', expected an amount of memory such as 80Gi"),
        ("gpus=8,gpus=4", "found gpus twice"),
    ],
)
def test_a_wrong_expectation_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_expectations(text)
