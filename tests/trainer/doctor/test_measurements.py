"""The measurements of this machine, and what each says when it fails."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from internvl_trainer.all_reduce import WrongSum, timed_all_reduce
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.doctor import kernels
from internvl_trainer.doctor.all_reduce import measure_all_reduce
from internvl_trainer.doctor.bandwidth import lacking_room, measure_disk, measure_storage
from internvl_trainer.doctor.kernels import measure_kernels, run_kernel
from internvl_trainer.doctor.machine import AllReduce, Disk, Problem, Transfer

pytestmark = pytest.mark.slow


def test_the_processors_flash_kernel_agrees_with_math() -> None:
    found = {each.name: each for each in measure_kernels([torch.device("cpu")])}
    error = found["sdpa flash"].error
    assert error is not None
    assert 0 < error < 1e-2
    assert found["varlen"].missing == "needs a GPU"


def test_kernels_are_compared_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def error(_way: object, device: torch.device, **_: object) -> float:
        asked.append(device)
        return 0.5 if device.index == 1 else 1e-3

    monkeypatch.setattr(kernels, "kernel_error", error)
    devices = [torch.device("meta", index) for index in range(3)]
    found = measure_kernels(devices)
    assert asked == devices * 5
    assert {(each.device, each.error) for each in found} == {("meta:0", 1e-3), ("meta:1", 0.5), ("meta:2", 1e-3)}
    assert len({each.name for each in found}) == 5


def test_a_kernel_that_computes_wrongly_or_breaks_is_told_from_one_that_is_not_here() -> None:
    assert run_kernel("k", lambda: 0.5).error == 0.5

    def broken() -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def absent() -> float:
        raise RuntimeError("No available kernel. Aborting execution.")

    assert run_kernel("k", broken).failure.endswith("an illegal memory access was encountered")
    assert run_kernel("k", absent).missing == "No available kernel"


def test_two_processes_reduce_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = measure_all_reduce("cpu", 2, 1)
    assert isinstance(found, AllReduce)
    assert (found.backend, found.processes) == ("gloo", 2)
    assert found.rate > 0
    assert measure_all_reduce("cpu", 1, 1) is None


def test_a_wrong_sum_is_told_after_the_last_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank reduces as often as the others, so that the group stays usable."""
    calls = []
    monkeypatch.setattr(torch.distributed, "all_reduce", calls.append)  # leaves each rank its own numbers
    with pytest.raises(WrongSum, match="262144 of 262144 numbers are not 3"):
        timed_all_reduce("cpu", 0, 2, 1)
    wrong = len(calls)
    timed_all_reduce("cpu", 0, 1, 1)
    assert wrong == len(calls) - wrong > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_process_that_cannot_join_is_named() -> None:
    found = measure_all_reduce("cuda", 2, 1)
    assert isinstance(found, Problem)
    assert found.text.startswith("nccl: process 0 of 2: ")


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = measure_disk(4)
    assert isinstance(found, Disk)
    assert min(found.write, found.read, found.free) > 0
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert measure_disk(4) == Problem(f"{tmp_path / 'absent'}: No such file or directory")


def test_the_file_on_disk_has_no_name_that_a_kill_could_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append((os.fstat(descriptor).st_size, os.listdir(tmp_path)))
    )
    assert isinstance(measure_disk(4), Disk)
    assert seen == [(4 * 2**20, [])]


def test_a_file_larger_than_half_of_the_free_room_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**30))
    assert lacking_room(1536) == ""
    says = f"found a test file of 1537 MiB, expected at most 1536 MiB: half of the 3.0 GiB that are free in {tmp_path}"
    assert lacking_room(1537) == says
    assert measure_disk(1537) == Problem(says)
    assert measure_storage(str(tmp_path / "storage"), 1537) == Problem(f"not measured: {says}")
    assert os.listdir(tmp_path) == []


def test_a_folder_as_storage_is_left_as_it_was(tmp_path: Path) -> None:
    found = measure_storage(str(tmp_path), 1)
    assert isinstance(found, Transfer)
    assert min(found.upload, found.download) > 0
    assert found.clock_ahead == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_storage_whose_clock_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderStorage, "modified", lambda self, key: time.time() + 90)
    found = measure_storage(str(tmp_path), 1)
    assert isinstance(found, Transfer)
    assert found.clock_ahead == pytest.approx(90, abs=5)


def test_a_storage_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = measure_storage(str(tmp_path / "file"), 1)
    assert isinstance(found, Problem)
    assert "file" in found.text
    assert isinstance(measure_storage("ftp://host/x", 1), Problem)
    for uri, expected in (
        ("s3://", "s3://bucket/prefix"),
        ("gs:///x", "gs://bucket/prefix"),
        ("az://", "az://container"),
    ):
        found = measure_storage(uri, 1)
        assert isinstance(found, Problem)
        assert f"found '{uri}', which names no " in found.text
        assert f"; expected {expected}" in found.text
    assert os.listdir(tmp_path) == ["file"]
