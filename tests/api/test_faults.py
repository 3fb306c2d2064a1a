"""What GPU, driver, NCCL and network print when they fail, as torch 2.13 passes it on, and the reason of each."""

import pytest
from internvl_api.faults import FAULTS, blamed, find

CUDA = """\
torch.AcceleratorError: CUDA error: {text}
Search for `{name}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Device-side assertion tracking was not enabled by user."""
NCCL = """\
torch.distributed.DistBackendError: NCCL error in: /__w/pytorch/pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, \
{string}, NCCL version 2.29.7
{name}
Last error:
{last}"""
UNHANDLED = "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
CALL_FAILED = "ncclUnhandledCudaError: Call to CUDA function failed."
SYSTEM = "unhandled system error (run with NCCL_DEBUG=INFO for details)"
CALL_OR_DEVICE = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
WATCHDOG = (
    "[rank12]:[E817 17:40:34.227531918 ProcessGroupNCCL.cpp:2057] [PG ID 0 PG GUID 0(default_pg) Rank 12] Process "
    "group watchdog thread terminated with exception: {text}\nSearch for `cudaErrorX' in https://docs.nvidia.com\n"
    "Exception raised from c10_cuda_check_implementation at /__w/pytorch/c10/cuda/CUDAException.cpp:44 (most recent "
    "call first):\nframe #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x9d (0x15 in /lib/libc10.so)\n"
)


def cuda(text: str, name: str = "cudaErrorX") -> str:
    return CUDA.format(text=text, name=name)


def nccl(last: str, string: str = UNHANDLED, name: str = CALL_FAILED) -> str:
    return NCCL.format(string=string, name=name, last=last)


TEXTS = {
    "GpuOutOfMemory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.11 "
        "GiB of which 1.20 GiB is free.",
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)",
        "RuntimeError: a kernel failed:\nCUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity …",
        cuda("out of memory", "cudaErrorMemoryAllocation"),
        "RuntimeError: CUDA driver error: out of memory",
        "RuntimeError: Triton Error [CUDA]: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "RuntimeError: cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        nccl("Cuda failure 2 'out of memory'"),
        nccl("Cuda failure 'out of memory'"),
        nccl("Failed to CUDA calloc 10485760 bytes"),
        nccl("Failed to CUDA calloc async 608 bytes"),
        "RuntimeError: cuFFT error: CUFFT_ALLOC_FAILED",
        "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp",
        "CUDA error (/build/flash-attention/csrc/flash_attn/src/flash_fwd_launch_template.h:188): out of memory",
        'RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131, '
        "please report a bug to PyTorch.",
        WATCHDOG.format(text="CUDA error: out of memory"),
    ),
    "GpuHardwareError": (
        cuda("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
        cuda("uncorrectable NVLink error detected during the execution"),
        cuda("Invalid access of peer GPU memory over nvlink or a hardware error"),
        cuda("hardware stack error"),
        nccl("Cuda failure 214 'uncorrectable ECC error encountered'"),
        WATCHDOG.format(text="CUDA error: uncorrectable ECC error encountered"),
        "pynvml.NVMLError_GpuIsLost: GPU is lost",
        "RuntimeError: Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.",
        "NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, name=python, GPU has fallen off the bus.",
    ),
    "GpuUnavailable": (
        cuda("no CUDA-capable device is detected", "cudaErrorNoDevice"),
        cuda("initialization error"),
        cuda("CUDA-capable device(s) is/are busy or unavailable"),
        cuda("invalid device ordinal") + "\nGPU device may be out of range, do you have enough GPUs?",
        cuda("no kernel image is available for execution on the device"),
        cuda("unknown error"),
        nccl("Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'"),
        "RuntimeError: No CUDA GPUs are available",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a "
        "driver from http://www.nvidia.com/Download/index.aspx",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update it",
        "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env "
        "variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero.",
        cuda("peer access is not supported between these two devices"),
        cuda("peer mapping resources exhausted"),
        "RuntimeError: CUDA error: CUBLAS_STATUS_ARCH_MISMATCH when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED",
        "RuntimeError: CUDA driver initialization failed, you might not have a CUDA gpu.",
        nccl(
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000",
            "invalid usage (run with NCCL_DEBUG=WARN for details)",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
        ),
        "Failed to initialize NVML: Unknown Error",
        "pynvml.NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch.",
        "RuntimeError: Failed to initialize NVML: Driver/library version mismatch",
    ),
    "DeviceAssertFailed": (
        cuda("device-side assert triggered", "cudaErrorAssert"),
        WATCHDOG.format(text="CUDA error: device-side assert triggered"),
    ),
    "RdmaRegistrationFailed": (
        nccl("Call to ibv_reg_mr failed with error Cannot allocate memory", SYSTEM, CALL_OR_DEVICE),
        nccl("Call to ibv_reg_mr_iova2 failed with error Bad address", SYSTEM, CALL_OR_DEVICE),
        nccl("Call to ibv_reg_dmabuf_mr failed with error Invalid argument", SYSTEM, CALL_OR_DEVICE),
        nccl("Call to ibv_create_cq failed with error Cannot allocate memory", SYSTEM, CALL_OR_DEVICE),
        nccl("Call to mlx5dv_reg_dmabuf_mr failed with error Bad address", SYSTEM, CALL_OR_DEVICE),
    ),
    "NodeUnfit": (
        "internvl_trainer.stages.doctor.NodeUnfit: doctor: 1 check failed on this node: NVLink: 8 links a GPU "
        "(expected 18: choose another kind of node)",
        "NodeUnfit: doctor: 2 checks failed on this node: disk: /scratch: Read-only file system (set TMPDIR)",
    ),
    "SharedMemoryFull": (
        nccl(
            "Error while creating shared memory segment /dev/shm/nccl-dnPbjl (size 33030528), error: No space left on "
            "device (28)",
            SYSTEM,
            CALL_OR_DEVICE,
        ),
        "RuntimeError: unable to write to file </torch_812_2718281828_7>: No space left on device (28)",
        "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
    ),
    "OutOfMemory": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
        "MemoryError: Unable to allocate 2.00 GiB for an array with shape (8, 268435456) and data type uint8",
        "OSError: [Errno 12] Cannot allocate memory",
        "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed. ",
        nccl("Failed to CUDA host alloc 4096 bytes"),
        "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    ),
    "GpuFault": (
        cuda("an illegal memory access was encountered", "cudaErrorIllegalAddress"),
        cuda("unspecified launch failure", "cudaErrorLaunchFailure"),
        cuda("the launch timed out and was terminated"),
        cuda("misaligned address"),
        "RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered",
        "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n)`",
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART",
        "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "RuntimeError: cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "CUDA error (flash_bwd_launch_template.h:47): an illegal memory access was encountered",
        nccl("Cuda failure 700 'an illegal memory access was encountered'"),
        nccl(""),
        "[rank3]:[F1129 01:12:00 ProcessGroupNCCL.cpp:1622] [PG ID 0 PG GUID 0(default_pg) Rank 3] ProcessGroupNCCL's "
        "watchdog got stuck for 480 seconds without making progress in monitoring enqueued collectives.",
    ),
    "PeerLost": (
        "RuntimeError: [gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.1]:5",
        "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
        "RuntimeError: Application timeout caused pair closure",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "BrokenPipeError: [Errno 32] Broken pipe",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, "
        "NumelOut=1, Timeout(ms)=600000) ran for 600026 milliseconds before timing out.",
        "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 1.",
        "torch.distributed.DistBackendError: NCCL timeout in: /__w/pytorch/torch/csrc/NCCLUtils.cpp:94",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
        "server shutdown or crash?",
        "torch.distributed.DistStoreError: wait timeout after 600000ms, keys: /default_pg/0//cuda//ncclUniqueId",
        "RuntimeError: Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:166] no error",
        nccl(
            "socketProgress: Connection closed by remote peer run-1.run.team.svc<40312>",
            "remote process exited or there was a network error",
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        ),
    ),
    "NetworkFault": (
        nccl(
            "NET/IB: Got completion from peer 10.0.0.2<47000> with status=IBV_WC_RETRY_EXC_ERR(12) "
            "opcode=IBV_WC_SEND(0) vendor_err=129",
            SYSTEM,
            CALL_OR_DEVICE,
        ),
        nccl(
            "Assertion failed in transport.cc",
            "internal error - please report this issue to the NCCL developers",
            "ncclInternalError: Internal check failed.",
        ),
        nccl(
            "Failed to initialize any NET plugin",
            "internal error - please report this issue to the NCCL developers",
            "ncclInternalError: Internal check failed.",
        ),
        nccl("Call to ibv_open_device failed", SYSTEM, CALL_OR_DEVICE),
        nccl("Call to connect to 10.0.0.2<47000> failed : No route to host", SYSTEM, CALL_OR_DEVICE),
        nccl("", SYSTEM, CALL_OR_DEVICE),
    ),
}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(text, reason, id=f"{reason}-{number}")
        for reason, texts in TEXTS.items()
        for number, text in enumerate(texts)
    ],
)
def test_the_reason_of_a_text(text: str, reason: str) -> None:
    noise = 'Traceback (most recent call last):\n  File "/x/trainer.py", line 3, in step\n    loss.backward()\n'
    for whole in (text, f"{noise}{text}\n[rank0]: the log goes on: out of memory.jpg\n"):
        found = find(whole)
        assert found is not None
        assert found.fault.reason == reason
        assert found.line in text
        assert found.line


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: cannot decode out of memory.jpg",
        "RuntimeError: cannot decode /data/CUDA error: out of memory.jpg",
        "RuntimeError: cannot decode '/data/CUDA error: out of memory'",
        "ValueError: no such picture: /data/CUDA out of memory/cat.png",
        "RuntimeError: cannot read /data/GPU is lost",
        "RuntimeError: cannot read the row 'GPU is lost. What now?'",
        "ValueError: the answer is 'uncorrectable ECC error encountered'",
        "RuntimeError: CUDA error: invalid configuration argument",
        "RuntimeError: CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_BAD_PARAM",
        "RuntimeError: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1",
        "KeyError: 'out of memory'",
        "RuntimeError: cannot decode Broken pipe.jpg",
        nccl(
            "rank 3 called it with another count",
            "invalid usage (run with NCCL_DEBUG=WARN for details)",
            "ncclInvalidUsage",
        ),
        "",
    ],
)
def test_other_texts_have_no_fault(text: str) -> None:
    assert find(text) is None


def test_every_row_of_the_table_has_a_text_here() -> None:
    assert {fault.reason for fault in FAULTS} == set(TEXTS)
    for fault in FAULTS:
        for row in fault.texts:
            alone = type(fault)(fault.reason, fault.blame, "", (row,))
            assert any(alone.regex.search(text) for text in TEXTS[fault.reason]), row


def test_who_is_to_blame() -> None:
    assert blamed("batch") == ("GpuOutOfMemory",)
    assert blamed("hardware") == ("GpuHardwareError",)
    assert blamed("node") == ("GpuUnavailable", "RdmaRegistrationFailed", "NodeUnfit", "GpuFault")
    assert blamed("peer") == ("PeerLost", "NetworkFault")
    assert blamed("run") == ("DeviceAssertFailed", "SharedMemoryFull", "OutOfMemory")


def test_a_long_line_is_cut() -> None:
    found = find("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate " + "9" * 1000)
    assert found is not None
    assert len(found.line) == 300
