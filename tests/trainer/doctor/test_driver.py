"""What a driver library reports becomes facts about the machine: a fake of NVML with one fault at a time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from internvl_trainer.doctor.checks import Level, check
from internvl_trainer.doctor.driver import nvml, read_driver
from internvl_trainer.doctor.expectations import Expectations
from internvl_trainer.doctor.machine import Driver, Gpu, Problem, TorchBuild
from trainer.doctor.test_checks import HEALTHY

GIB = 1024**3
real = nvml()


class FakeDriver:
    """The functions of pynvml that doctor calls, for eight GPUs; `faults` replaces answers by name."""

    NVMLError = real.NVMLError
    NVMLError_NotSupported = real.NVMLError_NotSupported
    NVMLError_InvalidArgument = real.NVMLError_InvalidArgument
    NVMLError_FunctionNotFound = real.NVMLError_FunctionNotFound
    NVMLError_NoPermission = real.NVMLError_NoPermission
    NVML_ERROR_LIBRARY_NOT_FOUND = real.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_ERROR_DRIVER_NOT_LOADED = real.NVML_ERROR_DRIVER_NOT_LOADED
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = real.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    NVML_VOLATILE_ECC = real.NVML_VOLATILE_ECC

    def __init__(self, **faults: Any) -> None:
        self._answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": b"580.65.06",
            "nvmlSystemGetCudaDriverVersion": 13000,
            "nvmlDeviceGetCount": 8,
            "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, used=GIB),
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1,  # idle
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,
            **faults,
        }
        self._links_down = faults.get("links_down", ())

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if self._links_down is None or link >= 18:
            raise real.NVMLError_NotSupported
        return int((handle, link) not in self._links_down)

    def __getattr__(self, name: str) -> Any:
        answer = self._answers[name]

        def ask(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask


def error(code: int) -> Exception:
    made: Exception = real.NVMLError(code)
    return made


UNSUPPORTED = error(real.NVML_ERROR_NOT_SUPPORTED)
FORBIDDEN = error(real.NVML_ERROR_NO_PERMISSION)
UNKNOWN = error(real.NVML_ERROR_FUNCTION_NOT_FOUND)


def test_a_healthy_node() -> None:
    driver, gpus = read_driver(FakeDriver())
    assert driver == Driver("580.65.06", (13, 0))
    assert gpus == (Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, GIB, (9, 0), links=18),) * 8


@pytest.mark.parametrize(
    ("faults", "found"),
    [
        ({"nvmlDeviceGetTotalEccErrors": 3}, {"uncorrected": 3}),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)}, {"remap_pending": True}),
        ({"nvmlDeviceGetRemappedRows": (0, 9, 0, 1)}, {"remap_failed": True}),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x4}, {"slowed": ""}),  # a power cap is usual under load
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x40}, {"slowed": "slowed by heat"}),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x80}, {"slowed": "slowed by the power supply"}),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x8}, {"slowed": "slowed by the hardware"}),
        ({"links_down": {(0, 3), (0, 4)}}, {"links": 18, "links_down": 2}),
        ({"links_down": None}, {"links": 0, "links_down": 0}),
        ({"nvmlDeviceGetTotalEccErrors": UNSUPPORTED}, {"uncorrected": None}),
        ({"nvmlDeviceGetTotalEccErrors": FORBIDDEN}, {"uncorrected": None}),
        ({"nvmlDeviceGetRemappedRows": UNSUPPORTED}, {"remap_failed": False}),
        ({"nvmlDeviceGetRemappedRows": UNKNOWN}, {"remap_failed": False}),
        ({"nvmlDeviceGetMemoryInfo": UNSUPPORTED}, {"memory": None, "used": 0}),
        # a driver before 535 has the former name alone
        (
            {"nvmlDeviceGetCurrentClocksEventReasons": UNKNOWN, "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40},
            {"slowed": "slowed by heat", "links": 18},
        ),
        (
            {"nvmlDeviceGetCurrentClocksEventReasons": UNKNOWN, "nvmlDeviceGetCurrentClocksThrottleReasons": UNKNOWN},
            {"slowed": None},
        ),
        ({"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, used=20 * GIB)}, {"used": 20 * GIB}),
        ({"nvmlDeviceGetCudaComputeCapability": (7, 5)}, {"capability": (7, 5)}),
    ],
)
def test_a_fault_of_a_gpu(faults: dict[str, Any], found: dict[str, Any]) -> None:
    _, gpus = read_driver(FakeDriver(**faults))
    assert {name: getattr(gpus[0], name) for name in found} == found


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"nvmlInit": error(real.NVML_ERROR_LIBRARY_NOT_FOUND)}, None),
        ({"nvmlInit": error(real.NVML_ERROR_DRIVER_NOT_LOADED)}, None),
        ({"nvmlInit": error(real.NVML_ERROR_LIB_RM_VERSION_MISMATCH)}, "the driver does not answer"),
        ({"nvmlDeviceGetMemoryInfo": error(real.NVML_ERROR_GPU_IS_LOST)}, "a GPU does not answer"),
    ],
)
def test_a_driver_that_does_not_answer(faults: dict[str, Any], says: str | None) -> None:
    driver, gpus = read_driver(FakeDriver(**faults))
    assert gpus == ()
    if says is None:
        assert driver is None
    else:
        assert isinstance(driver, Problem)
        assert says in driver.text


@pytest.mark.parametrize(
    ("faults", "row", "level", "says"),
    [
        ({}, "driver", "pass", "580.65.06"),
        ({"nvmlSystemGetCudaDriverVersion": 12040}, "driver", "failure", "up to CUDA 12.4"),
        ({"nvmlInit": error(real.NVML_ERROR_LIB_RM_VERSION_MISMATCH)}, "driver", "failure", "does not answer"),
        ({"nvmlDeviceGetMemoryInfo": error(real.NVML_ERROR_GPU_IS_LOST)}, "driver", "failure", "a GPU does not answer"),
        ({"nvmlInit": error(real.NVML_ERROR_DRIVER_NOT_LOADED)}, "driver", "warning", "no NVIDIA driver"),
        ({"nvmlDeviceGetCount": 9}, "pytorch", "warning", "uses 8 GPUs"),
        (
            {"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, used=20 * GIB)},
            "GPU memory",
            "warning",
            "GPU 7 20.0 GiB",
        ),
        ({"nvmlDeviceGetTotalEccErrors": 3}, "GPU health", "failure", "GPU 7: 3 uncorrectable"),
        ({"nvmlDeviceGetRemappedRows": (0, 9, 0, 1)}, "GPU health", "failure", "no spare memory rows left"),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)}, "GPU health", "warning", "wait for a reset"),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x40}, "GPU health", "warning", "GPU 0: slowed by heat"),
        ({"nvmlDeviceGetCurrentClocksEventReasons": UNKNOWN}, "driver", "pass", "580.65.06"),
        ({"nvmlDeviceGetCurrentClocksEventReasons": UNKNOWN}, "GPU health", "pass", "no memory errors, full clock"),
        ({"nvmlDeviceGetTotalEccErrors": FORBIDDEN}, "GPU health", "pass", "does not report memory errors, full clock"),
        ({"nvmlDeviceGetMemoryInfo": UNSUPPORTED}, "GPUs", "pass", "8 x NVIDIA H100"),
        ({"nvmlDeviceGetMemoryInfo": UNSUPPORTED}, "GPU memory", "skipped", "does not report it"),
        ({"links_down": {(0, 3), (0, 4)}}, "NVLink", "failure", "GPU 0: 2 of 18 links down"),
        ({"links_down": None}, "NVLink", "warning", "none"),
        ({"nvmlDeviceGetCudaComputeCapability": (7, 5)}, "bf16", "failure", "compute capability 7.5"),
    ],
)
def test_a_fault_reaches_its_row(faults: dict[str, Any], row: str, level: Level, says: str) -> None:
    driver, gpus = read_driver(FakeDriver(**faults))
    machine = replace(HEALTHY, driver=driver, gpus=gpus, torch=TorchBuild("2.13.0", (13, 0), 8 if gpus else 0))
    (found,) = [each for each in check(machine, Expectations()) if each.name == row]
    assert (found.level, says in found.found) == (level, True), found
