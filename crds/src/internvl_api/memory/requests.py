"""What the pods of a stage need of their node: cores, memory, disk and shared memory.

The operator requests this where a spec and its own settings say nothing, and warns where they say less. Only runs on
GPUs with a model of the catalogue have it: the dimensions of other models are unknown before a pod reads them, and a
run on the CPU is a trial of a small model.

The figures of a process are the resident memory of Python with torch's and CUDA's libraries, and of a data worker with
a tokenizer and pictures being decoded, rounded up. `internvl_host_memory_peak_bytes` of a run says what it really used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from internvl_api.address import OBJECT_STORES
from internvl_api.memory.setup import Row, Setup, setup_on_gpus
from internvl_api.memory.stop_time import CHECKPOINT_BYTES, checkpoint_share
from internvl_api.models.retrieval import RetrievalCatalogueModel
from internvl_api.quantity import GIB
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

PREFETCHED = 4  # micro batches that each data worker prepares ahead
DEFAULT_SHM = 8 * GIB

_PROCESS_BYTES = int(2.5 * GIB)
_DATA_WORKER_BYTES = int(0.7 * GIB)
_POD_BYTES = GIB  # the launcher, and files that the kernel counts
_WORKER_CORES = 0.5  # a data worker waits for storage the other half of the time
_SHM_MARGIN = GIB  # NCCL's own segments
_CHECKPOINT_FILE = GIB // 2  # largest file of a checkpoint; a rank has two while it resumes, one while it saves
_ROW_BYTES = 4 * 8  # of one token of a batch: ids, labels, mask and positions, int64 each
_EXPORT_BYTES = 10 * GIB  # of a rank: a shard of the exported model, and the one that is uploaded


@dataclass(frozen=True)
class Needs:
    """What one pod needs. The parts say what their sums are made of.

    Attributes:
        cores: of the CPU.
        memory: bytes by purpose; /dev/shm counts as memory.
        cache: bytes of /cache by purpose, without the run's own media.
        scratch: bytes of /scratch by purpose.
        shm: bytes of /dev/shm.
    """

    cores: float
    memory: Mapping[str, int]
    cache: Mapping[str, int] = field(default_factory=dict)
    scratch: Mapping[str, int] = field(default_factory=dict)
    shm: int = 0

    @property
    def disk(self) -> dict[str, int]:
        """Bytes by purpose, of /cache and /scratch."""
        return {name: amount for name, amount in (*self.cache.items(), *self.scratch.items()) if amount}

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    def requests(self) -> dict[str, str]:
        """The amounts as Kubernetes' requests, in whole cores and Gi."""
        disk = {"ephemeral-storage": whole_gi(self.disk_bytes)} if self.disk else {}
        return {"cpu": str(math.ceil(self.cores)), "memory": whole_gi(self.memory_bytes), **disk}


def whole_gi(amount: int) -> str:
    """Bytes as a quantity, rounded up: `3Gi`."""
    return f"{-(-amount // GIB)}Gi"


def needs(config: RunConfig, stage: StageName) -> Needs | None:
    """What a pod of a stage needs; None on the CPU, and for models outside the catalogue."""
    setup = setup_on_gpus(config)
    if setup is None:
        return None
    weights = setup.element_bytes * setup.model.parameters
    base = {"weights of the base model": weights if _is_copied(config.model.source) else 0}
    if stage == "train":
        return _training(config, setup, {} if _reads_parts(config) else base)
    # Full training leaves a whole model, and nothing reads the base any more.
    is_whole = stage in ("evaluate", "merge") and config.method == "full"
    trained = {"trained weights": weights if is_whole else setup.element_bytes * setup.trainable_parameters}
    if stage in ("evaluate", "baseline-evaluate"):
        trains = stage == "evaluate" and config.trains
        fetched = trained if trains and _is_copied(config.output) else {}
        return _evaluation(config, setup, fetched if is_whole else base | fetched)
    if stage == "merge":
        return _merge(setup, {} if is_whole else base, trained)
    if stage in ("score", "baseline-score"):
        return Needs(2, {"process": 2 * GIB, "METEOR": 2 * GIB})
    if stage == "doctor":  # the ranks, and as many processes that reduce among the GPUs of the node
        processes = 2 * config.processes_per_worker
        return Needs(processes, {f"{processes} processes": processes * _PROCESS_BYTES})
    if stage == "preflight":
        return Needs(2, {"processes": 4 * GIB})
    uploaded = weights if config.method == "full" or config.merge.formats else trained["trained weights"]
    files = {"files being uploaded": min(uploaded, _EXPORT_BYTES) if config.publish.hub else 0}
    return Needs(1, {"process": 2 * GIB}, scratch=files)


def _is_copied(address: str) -> bool:
    """Whether a pod copies files to its disk before it uses them; those of a volume are used where they are."""
    return not address.startswith(("/", "pvc://"))


def _reads_parts(config: RunConfig) -> bool:
    """Whether each worker reads its own share of the base model at the source: ZeRO-3 over several workers.

    A web server may give no parts of a file, so a base model at https:// may need room for all of it.
    """
    several = config.training.zero_stage == 3 and config.workers > 1
    source = config.model.source
    return several and not config.model.resize_embeddings and source.startswith(("hf://", *OBJECT_STORES))


def _training(config: RunConfig, setup: Setup, base: Mapping[str, int]) -> Needs:
    ranks, workers = config.processes_per_worker, config.training.data_workers
    shm = _batches_in_flight(setup, ranks, workers) + _SHM_MARGIN
    share = checkpoint_share(setup, config.workers)
    memory = {
        "launcher": _POD_BYTES,
        f"{ranks} processes": ranks * _PROCESS_BYTES,
        f"{ranks * workers} data workers": ranks * workers * _DATA_WORKER_BYTES,
        "batches in /dev/shm": shm,
        "tensors being loaded": ranks * _tensors(setup, setup.element_bytes),
        "snapshot of a checkpoint": share,
        "offloaded by ZeRO": _offloaded(setup, ranks),
    }
    exported = setup.model.parameters if config.method == "full" else setup.trainable_parameters
    scratch = {
        "checkpoint files": min(share, 2 * ranks * _CHECKPOINT_FILE),
        "exported shards": min(setup.element_bytes * exported, ranks * _EXPORT_BYTES),
    }
    cores = ranks * (1 + _WORKER_CORES * workers)
    return Needs(cores, {name: amount for name, amount in memory.items() if amount}, base, scratch, shm)


def _evaluation(config: RunConfig, setup: Setup, fetched: Mapping[str, int]) -> Needs:
    ranks = config.processes_per_worker
    memory = {
        "launcher": _POD_BYTES,
        f"{ranks} processes": ranks * _PROCESS_BYTES,
        "tensors being loaded": ranks * _tensors(setup, setup.element_bytes),
        "/dev/shm": _SHM_MARGIN,
    }
    return Needs(2 * ranks, memory, fetched, shm=_SHM_MARGIN)


def _merge(setup: Setup, base: Mapping[str, int], trained: Mapping[str, int]) -> Needs:
    """Tensors are merged one at a time, in fp32; the disk holds one merged model, whatever the formats."""
    memory = {"process": _PROCESS_BYTES, "tensors being merged": _tensors(setup, 4)}
    merged = {"merged model": setup.element_bytes * setup.model.parameters}
    return Needs(2, memory, base, {**trained, **merged})


def _tensors(setup: Setup, element_bytes: int) -> int:
    """Bytes of the largest tensor, twice: as it is read and as it is needed."""
    return 2 * element_bytes * max(elements for elements, _ in setup.model.matrices())


def _batches_in_flight(setup: Setup, ranks: int, workers: int) -> int:
    """Bytes of the batches that data workers prepared, if every row is as long as allowed and full of tiles."""
    if isinstance(setup.model, RetrievalCatalogueModel):
        tokens, tiles = 3 * setup.max_seq_length, 1
    elif setup.pack is not None:
        tokens, tiles = setup.pack
    else:
        tokens, tiles = setup.max_seq_length, max(1, setup.max_seq_length // setup.context_tokens)
    row = tiles * 3 * setup.tile_size**2 + tokens * _ROW_BYTES
    batches = workers * PREFETCHED if workers else 1
    return int(ranks * batches * setup.rows(Row(tokens, tiles, 0)) * row)


def _offloaded(setup: Setup, ranks: int) -> int:
    """Bytes that ZeRO keeps in the host's memory: optimizer state, weights of ZeRO-3."""
    optimizer = (CHECKPOINT_BYTES + 4) * setup.trainable_parameters if setup.zero.offload_optimizer else 0
    weights = setup.element_bytes * setup.model.parameters if setup.zero.offload_parameters else 0
    return (optimizer + weights) * ranks // setup.world_size


def size_of_shm(config: RunConfig) -> int:
    """Bytes of /dev/shm that a training worker needs; at least, and for an unknown model, DEFAULT_SHM."""
    found = needs(config, "train")
    return max(DEFAULT_SHM, found.shm) if found else DEFAULT_SHM
