"""FAULTS: the texts with which GPU, driver, NCCL and network fail, the reason of each, and who is to blame.

The trainer finds the reason of a text here, the operator who is to blame for a reason. The texts are those of torch
2.13, CUDA 13.0, cuDNN 9.20 and NCCL 2.29; each row names who prints them.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

# batch: the micro batch is too large. hardware: the node's hardware is broken, and breaks again. node: its hardware,
# driver or setup is suspect. peer: another process or the network between them, which this process cannot tell.
# run: the settings, the data or the trainer.
Blame = Literal["batch", "hardware", "node", "peer", "run"]
_QUOTED = 300  # characters

# A text starts a line or follows a prefix, so that a path which holds its words does not match.
_START = r"(?<![^\s:\]])"


class Text(NamedTuple):
    """A pattern of one line, and who prints it."""

    source: str
    pattern: str


@dataclass(frozen=True)
class Fault:
    """A reason with its texts; `advice` is the user's next step."""

    reason: str
    blame: Blame
    advice: str
    texts: tuple[Text, ...]

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """Any of the texts, within one line of a message."""
        return re.compile("|".join(f"(?:{text.pattern})" for text in self.texts), re.MULTILINE)


class Diagnosis(NamedTuple):
    """The fault that a message is about, and the line of it that says so."""

    fault: Fault
    line: str


def _cuda(*texts: str) -> Text:
    """Strings of cudaGetErrorString and cuGetErrorString, in the sentences of torch, NCCL and Triton."""
    either = "|".join(re.escape(text) for text in texts)
    prefixes = (
        r"CUDA error: ",  # torch, c10/cuda/CUDAException.cpp
        r"CUDA driver error: ",  # torch, c10/cuda/driver_api.h
        r"Error \d+: ",  # torch.cuda.init, after "Unexpected error from cudaGetDeviceCount()"
        r"Triton Error \[CUDA\]: ",
        r"CUDA error \([^()\n]{1,300}:\d+\): ",  # flash-attn
    )
    sentences = rf"{_START}(?:{'|'.join(prefixes)})(?:{either})\s*$"
    nccl = rf"Cuda failure (?:\d+ )?'(?:{either})'"  # NCCL, CUDACHECK in include/checks.h
    return Text("CUDA runtime and driver", f"{sentences}|{nccl}")


def _status(library: str, *names: str) -> Text:
    """Status codes of a CUDA library, as torch quotes them: `CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …`."""
    return Text(library, rf"{_START}(?:CUDA|cuDNN|cusolver|cuFFT) error: (?:{'|'.join(names)})\b")


# The first fault whose text matches wins, so the specific ones stand before the general ones.
FAULTS = (
    Fault(
        reason="GpuOutOfMemory",
        blame="batch",
        advice="",  # the operator knows what can get smaller
        texts=(
            Text("torch, the caching allocator", r"^torch\.OutOfMemoryError: |CUDA out of memory\. Tried to allocate "),
            _cuda("out of memory"),
            _status("cuBLAS", "CUBLAS_STATUS_ALLOC_FAILED"),
            _status("cuDNN", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            _status("cuSOLVER", "CUSOLVER_STATUS_ALLOC_FAILED"),
            _status("cuFFT", "CUFFT_ALLOC_FAILED"),
            Text("NCCL, include/alloc.h", r"Failed to CUDA calloc (?:async )?\d+ bytes"),
            Text("bitsandbytes", rf"{_START}Error out of memory at line \d+ in file "),
            # The allocator asks NVML what is in use only when memory runs out.
            Text(
                "torch, CUDACachingAllocator.cpp",
                r"NVML_SUCCESS == \w+ INTERNAL ASSERT FAILED at \S*CUDACachingAllocator\.cpp",
            ),
        ),
    ),
    Fault(
        reason="GpuHardwareError",
        blame="hardware",
        advice="the GPU, its memory or its link is broken: cordon the node, and look for Xid errors in its kernel log",
        texts=(
            _cuda(
                "uncorrectable ECC error encountered",
                "uncorrectable NVLink error detected during the execution",
                "Invalid access of peer GPU memory over nvlink or a hardware error",
                "hardware stack error",
            ),
            Text("NVML, nvmlErrorString", rf"{_START}GPU is lost\.?\s*$|{_START}GPU requires reset\.?\s*$"),
            Text("driver, Xid 79", rf"{_START}GPU has fallen off the bus\.?\s*$"),
        ),
    ),
    Fault(
        reason="GpuUnavailable",
        blame="node",
        advice="the node has no GPU that this image can use: compare its driver with the image's CUDA, and run "
        "nvidia-smi there; a MIG or MPS setting, or a device plugin that gives no GPU, also ends so",
        texts=(
            _cuda(
                "initialization error",
                "no CUDA-capable device is detected",
                "CUDA-capable device(s) is/are busy or unavailable",
                "exclusive-thread device already in use by a different thread",
                "invalid device ordinal",
                "CUDA driver version is insufficient for CUDA runtime version",
                "CUDA driver is a stub library",
                "API call is not supported in the installed CUDA driver",
                "system not yet initialized",
                "system has unsupported display driver / cuda driver combination",
                "forward compatibility was attempted on non supported HW",
                "no kernel image is available for execution on the device",
                "the provided PTX was compiled with an unsupported toolchain.",
                "device doesn't have valid Grid license",
                "integrity checks failed",
                "startup failure in cuda runtime",
                "OS call failed or operation not supported on this OS",
                "MPS client failed to connect to the MPS control daemon or the MPS server",
                "MPS server is not ready to accept new MPS client requests",
                "unknown error",
                "peer access is not supported between these two devices",
                "peer mapping resources exhausted",
            ),
            _status("cuBLAS", "CUBLAS_STATUS_ARCH_MISMATCH"),
            _status("cuDNN", r"CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED", r"CUDNN_STATUS_NOT_SUPPORTED_ARCH_MISMATCH"),
            Text("NCCL, init.cc", r"Duplicate GPU detected : rank \d+ and rank \d+"),
            Text("torch.cuda.init", rf"{_START}CUDA driver initialization failed, you might not have a CUDA gpu\."),
            Text("torch.cuda.init", rf"{_START}No CUDA GPUs are available\s*$"),
            Text("torch.cuda.init", rf"{_START}Found no NVIDIA driver on your system\."),
            Text("torch.cuda.init", rf"{_START}The NVIDIA driver on your system is too old \(found version "),
            Text(
                "torch.cuda.init", rf"{_START}CUDA unknown error - this may be due to an incorrectly set up environment"
            ),
            Text("NVML", rf"{_START}(?:Failed to initialize NVML: )?Driver/library version mismatch\s*$"),
            Text("nvidia-smi and NVML", rf"{_START}Failed to initialize NVML: Unknown Error\s*$"),
            Text("NVML", rf"{_START}RM has detected an NVML/RM version mismatch\.?\s*$"),
        ),
    ),
    Fault(
        reason="DeviceAssertFailed",
        blame="run",
        advice="a kernel found an index out of range, mostly a token id or a label: the log of the pod has the "
        "assertion; check model.resizeEmbeddings and the tokenizer, and report it if both are right",
        texts=(_cuda("device-side assert triggered"),),
    ),
    Fault(
        reason="RdmaRegistrationFailed",
        blame="node",
        advice="the network card could not register memory: give the container the capability IPC_LOCK, raise the "
        "node's limit of locked memory (ulimit -l) to unlimited, and load nvidia-peermem there",
        texts=(
            Text("NCCL, misc/ibvwrap.cc", r"Call to ibv_reg_(?:dmabuf_)?mr(?:_iova2)? failed with error "),
            Text("NCCL, misc/ibvwrap.cc", r"Call to ibv_\w+ failed with error Cannot allocate memory"),
            Text("NCCL, misc/mlx5dvwrap.cc", r"Call to mlx5dv_reg_dmabuf_mr failed with error "),
        ),
    ),
    Fault(
        reason="NodeUnfit",
        blame="node",
        advice="run `internvl-trainer doctor` on the node for the whole table, or lower spec.doctor.expect",
        texts=(Text("the stage doctor", r"doctor: \d+ checks? failed on this node: "),),
    ),
    Fault(
        reason="SharedMemoryFull",
        blame="run",
        advice="/dev/shm is full: raise spec.podTemplate.shmSize, or lower spec.training.dataWorkers",
        texts=(
            Text("NCCL, misc/shmutils.cc", r"shared memory segment /dev/shm/nccl-\S+ .*No space left on device"),
            Text("torch, MapAllocator.cpp", r"</?torch_\d+_\d+_\d+>: No space left on device \(28\)"),
            Text("torch, the DataLoader", rf"{_START}DataLoader worker \(pid [\d, ]+\) is killed by signal: Bus error"),
        ),
    ),
    Fault(
        reason="OutOfMemory",
        blame="run",
        advice="the host's memory is full, not a GPU's: raise spec.podTemplate.resources.limits.memory, or lower "
        "spec.training.dataWorkers",
        texts=(
            Text("torch, c10/core/impl/alloc_cpu.cpp", r"DefaultCPUAllocator: (?:can't allocate|not enough) memory: "),
            Text("Python", r"^MemoryError: "),
            Text("Python, os.strerror", rf"{_START}\[Errno 12\] Cannot allocate memory\s*$"),
            Text("torch, the DataLoader", rf"{_START}DataLoader worker \(pid [\d, ]+\) is killed by signal: Killed"),
            Text("NCCL, include/alloc.h", r"Failed to CUDA host alloc \d+ bytes"),
            _status("cuDNN", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        ),
    ),
    Fault(
        reason="GpuFault",
        blame="node",
        advice="a broken GPU, its driver or a mistake in a kernel can cause this: if it is always the same node, "
        "cordon it and look for Xid errors in its kernel log; if it is always the same step, report it",
        texts=(
            _cuda(
                "unspecified launch failure",
                "unspecified launch failure in prior launch",
                "an illegal memory access was encountered",
                "an illegal instruction was encountered",
                "misaligned address",
                "invalid program counter",
                "operation not supported on global/shared address space",
                "the launch timed out and was terminated",
                "context is destroyed",
                "tensor memory not completely freed",
                "an async error has occured in external entity outside of CUDA",  # CUDA's spelling
                "the MPS client has been terminated by the server",
            ),
            _status(
                "cuBLAS",
                "CUBLAS_STATUS_NOT_INITIALIZED",
                "CUBLAS_STATUS_MAPPING_ERROR",
                "CUBLAS_STATUS_EXECUTION_FAILED",
                "CUBLAS_STATUS_INTERNAL_ERROR",
            ),
            _status(
                "cuDNN",
                "CUDNN_STATUS_NOT_INITIALIZED",
                "CUDNN_STATUS_MAPPING_ERROR",
                r"CUDNN_STATUS_EXECUTION_FAILED\w*",
                r"CUDNN_STATUS_INTERNAL_ERROR\w*",
            ),
            _status("cuSOLVER", "CUSOLVER_STATUS_EXECUTION_FAILED", "CUSOLVER_STATUS_INTERNAL_ERROR"),
            Text("torch, ProcessGroupNCCL.cpp", r"ProcessGroupNCCL's watchdog got stuck for \d+ seconds"),
            Text("NCCL, ncclGetErrorString(1)", r"unhandled cuda error \(run with NCCL_DEBUG"),
        ),
    ),
    Fault(
        reason="PeerLost",
        blame="peer",
        advice="another process of the run is gone or does not answer; its own log says why. The last checkpoint is "
        "whole",
        texts=(
            Text(
                "gloo and NCCL", r"Connection closed by (?:remote )?peer|Connection reset by peer|Broken pipe\b(?!\.\w)"
            ),
            Text("gloo", r"Timed out waiting|Application timeout caused pair closure"),
            Text("torch, ProcessGroupNCCL.cpp", r"collective operation timeout|NCCL communicator was aborted"),
            Text("torch, NCCLUtils.hpp", r"NCCL timeout in: "),
            Text("torch, TCPStore", r"[Ff]ailed to recv, got 0 bytes\b"),
            Text("torch, TCPStore", r"wait timeout after \d+ms, keys: "),
            Text("torch, ProcessGroupGloo.cpp", r"Gloo connectFullMesh failed with "),
            Text("NCCL, ncclGetErrorString(6)", r"ncclRemoteError|remote process exited or there was a network error"),
        ),
    ),
    Fault(
        reason="NetworkFault",
        blame="peer",
        advice="a call to the network between the workers failed: look at the node's network card and its switch "
        "(ibstat, ethtool), and at the other workers' logs",
        texts=(
            Text("NCCL, ncclGetErrorString(3)", r"^ncclInternalError: Internal check failed"),
            Text("NCCL, plugin/net.cc", r"Failed to initialize any NET plugin"),
            Text("NCCL, transport/net_ib", r"Got completion from peer .* with status="),
            Text("NCCL, misc/ibvwrap.cc", r"Call to ibv_\w+ failed"),
            Text("NCCL, misc/socket.cc", r"Call to (?:bind|connect|accept|recv|send|listen|socket|poll)\b.* failed"),
            Text("NCCL, ncclGetErrorString(2)", r"ncclSystemError: |unhandled system error \(run with NCCL_DEBUG"),
        ),
    ),
)


def find(text: str) -> Diagnosis | None:
    """The fault that a message is about; None for any other message."""
    for fault in FAULTS:
        if match := fault.regex.search(text):
            start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.start())
            return Diagnosis(fault, text[start : end if end >= 0 else None].strip()[:_QUOTED])
    return None


def blamed(*blames: Blame) -> tuple[str, ...]:
    """The reasons for which these are to blame."""
    return tuple(fault.reason for fault in FAULTS if fault.blame in blames)
