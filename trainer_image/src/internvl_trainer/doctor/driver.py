"""The NVIDIA driver and its GPUs, asked through NVML (nvidia-ml-py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from internvl_trainer.doctor.machine import Driver, Gpu, Problem

_MOST_LINKS = 18  # of a Hopper or Blackwell GPU
# Bits of the reasons for a lower clock that name a fault; an idle GPU or a power cap is none.
_SLOWED = {
    0x08: "slowed by the hardware",
    0x20: "slowed by heat",
    0x40: "slowed by heat",
    0x80: "slowed by the power supply",
}


def nvml() -> Any:
    """The library, without a driver yet."""
    import pynvml

    return pynvml


def read_driver(library: Any) -> tuple[Driver | Problem | None, tuple[Gpu, ...]]:
    """The driver and its GPUs; None and no GPU where no driver is installed.

    Args:
        library: pynvml, or what has its functions.
    """
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        absent = error.value in (library.NVML_ERROR_LIBRARY_NOT_FOUND, library.NVML_ERROR_DRIVER_NOT_LOADED)
        return (None if absent else Problem(f"the driver does not answer: {error}")), ()
    try:
        version = _text(library.nvmlSystemGetDriverVersion())
        cuda = library.nvmlSystemGetCudaDriverVersion()
        gpus = tuple(_gpu(library, index) for index in range(library.nvmlDeviceGetCount()))
    except library.NVMLError as error:  # "GPU is lost" and the like
        return Problem(f"a GPU does not answer: {error}"), ()
    finally:
        library.nvmlShutdown()
    return Driver(version, (cuda // 1000, cuda % 1000 // 10)), gpus


def _gpu(library: Any, index: int) -> Gpu:
    handle = library.nvmlDeviceGetHandleByIndex(index)
    memory = _optional(library, lambda: library.nvmlDeviceGetMemoryInfo(handle), None)
    uncorrected = _optional(library, lambda: _memory_errors(library, handle), None)
    rows = _optional(library, lambda: library.nvmlDeviceGetRemappedRows(handle), (0, 0, False, False))
    links = [_link(library, handle, number) for number in range(_MOST_LINKS)]
    present = [state for state in links if state is not None]
    major, minor = library.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=_text(library.nvmlDeviceGetName(handle)),
        memory=None if memory is None else int(memory.total),
        used=0 if memory is None else int(memory.used),
        capability=(major, minor),
        uncorrected=None if uncorrected is None else int(uncorrected),
        remap_pending=bool(rows[2]),
        remap_failed=bool(rows[3]),
        slowed=_slowed(library, handle),
        links=len(present),
        links_down=sum(not state for state in present),
    )


def _memory_errors(library: Any, handle: Any) -> Any:
    kind, since = library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, library.NVML_VOLATILE_ECC
    return library.nvmlDeviceGetTotalEccErrors(handle, kind, since)


def _slowed(library: Any, handle: Any) -> str | None:
    """Why the clock is held down; empty when it is not, None where the driver does not tell."""
    reasons = _optional(library, lambda: library.nvmlDeviceGetCurrentClocksEventReasons(handle), None)
    if reasons is None:  # its name before driver 535
        reasons = _optional(library, lambda: library.nvmlDeviceGetCurrentClocksThrottleReasons(handle), None)
    return None if reasons is None else next((text for bit, text in _SLOWED.items() if reasons & bit), "")


def _link(library: Any, handle: Any, number: int) -> Any:
    """Whether the NVLink is active; None where the GPU has no link of that number."""
    return _optional(library, lambda: library.nvmlDeviceGetNvLinkState(handle, number), None)


def _optional(library: Any, ask: Callable[[], Any], otherwise: Any) -> Any:
    """The answer; `otherwise` where GPU or driver does not support the call, or the container may not make it."""
    try:
        return ask()
    except (
        library.NVMLError_NotSupported,
        library.NVMLError_InvalidArgument,
        library.NVMLError_FunctionNotFound,
        library.NVMLError_NoPermission,
    ):
        return otherwise


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
