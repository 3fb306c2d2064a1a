"""What a user writes: `spec` of an InternVLFineTune.

A field in a section marked RECIPE below may be left out: `resolve` takes it from the recipe, else from the
default given here. The generated CRD therefore carries no `default` for those fields (an API server would fill
them in, and a recipe could no longer tell what the user wrote).
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from internvl_api.spec.evaluation import Evaluation
from internvl_api.types import ApiModel, Source, Template

Method = Literal["full", "lora", "head"]
Precision = Literal["bf16", "fp32"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

# Passed through to the pod untouched; the API server validates them when the pod is created.
KubernetesObject = dict[str, Any]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
OUTPUT_PATTERN = r"^(s3://[a-z0-9][a-z0-9.-]+/.+|/.+)$"
REPOSITORY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti)?$"
SECRET_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Model(ApiModel):
    """The base model. RECIPE."""

    name: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        max_length=128,
        description="A model of the catalogue; decides the template and default source",
    )
    source: Source | None = Field(
        None, description="Checkpoint folder in upstream's or the hf format; default: the catalogue's Hub repository"
    )
    template: Template | None = Field(
        None, description="Conversation template; default: the catalogue's, else the checkpoint's config.json"
    )
    drop_path_rate: float = Field(0.0, ge=0.0, lt=1.0, description="Stochastic depth of the vision tower")


class Dataset(ApiModel):
    """One annotation file and its media root: an entry of upstream's meta JSON."""

    annotation: Source = Field(description="JSONL file, one conversation a line; or what `format` says")
    format: Literal["chat", "flickr", "coco"] = Field(
        "chat", description="Retrieval models learn from flickr (lines of image,caption) or coco (Karpathy's JSON)"
    )
    root: Source | None = Field(
        None, description="Folder or archive (.zip, .tar, .tar.gz) of the media; default: the annotation's"
    )
    repeat_time: float = Field(1.0, gt=0.0, description="Below 1 keeps the FIRST part of the rows, as upstream does")
    data_augment: bool = False
    max_dynamic_patch: int | None = Field(None, ge=1, le=64, description="Overrides image.maxDynamicPatch")
    length: int | None = Field(None, ge=0, description="Rows expected in the annotation; checked when given")


class Data(ApiModel):
    """Training data: named datasets, or upstream's meta JSON as it is."""

    train: dict[str, Dataset] = Field(default_factory=dict, max_length=1000)
    meta: Source | None = Field(None, description="Upstream's meta JSON; its entries join those of train")
    validation: dict[str, Dataset] = Field(
        default_factory=dict, max_length=100, description="Held-out rows: their loss is taken during training"
    )
    bad_rows: Literal["fail", "skip"] = "fail"
    max_bad_rows: int = Field(0, ge=0, description="With badRows: skip, more findings than this still fail")
    compat: Literal["default", "upstream"] = Field(
        "default", description="upstream reproduces upstream's label defects, to compare numbers"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if not self.train and self.meta is None:
            raise ValueError("found neither train nor meta; name at least one dataset")
        if self.max_bad_rows and self.bad_rows == "fail":
            raise ValueError(f"found maxBadRows {self.max_bad_rows} with badRows: fail; set badRows to skip")
        return self


class Image(ApiModel):
    """How pictures become tiles. RECIPE."""

    tile_size: int | None = Field(None, ge=14, le=1024, description="Pixels; default: the checkpoint's")
    dynamic: bool = True
    min_dynamic_patch: int = Field(1, ge=1, le=64)
    max_dynamic_patch: int = Field(12, ge=1, le=64)
    thumbnail: bool = True
    video_frames: int = Field(8, ge=1, le=512, description="Frames sampled from a video, one tile each")

    @model_validator(mode="after")
    def _consistent(self) -> "Image":
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise ValueError(
                f"minDynamicPatch {self.min_dynamic_patch} exceeds maxDynamicPatch {self.max_dynamic_patch}; lower "
                "minDynamicPatch or raise maxDynamicPatch"
            )
        return self


class Freeze(ApiModel):
    """Which towers keep their weights. LoRA freezes the language model by itself."""

    vision: bool = True
    projector: bool = False
    language: bool = False


class Lora(ApiModel):
    """Adapter shape; alpha is 2 x rank as upstream sets it unless given. RECIPE."""

    language_rank: int = Field(16, ge=0, le=1024, description="0 leaves the language model without an adapter")
    vision_rank: int = Field(0, ge=0, le=1024)
    language_alpha: float | None = Field(None, gt=0)
    vision_alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.05, ge=0.0, lt=1.0)
    dora: bool = Field(False, description="Also learn the length of each row of an adapted weight (DoRA)")
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4 holds the language model's frozen weights in 4 bits (QLoRA); needs GPUs and bitsandbytes"
    )


class Packing(ApiModel):
    """Several rows in one sequence, each blind to the others: no padding, and even work for every process."""

    enabled: bool = False
    max_tokens: int = Field(16384, ge=16, description="Tokens in a pack (upstream's max_packed_tokens)")
    max_tiles: int = Field(48, ge=1, description="Tiles in a pack (upstream's num_images_expected)")
    buffer_size: int = Field(20, ge=1, le=1000, description="Packs open at a time (upstream's max_buffer_size)")


class Training(ApiModel):
    """Optimisation. RECIPE."""

    epochs: float = Field(1.0, gt=0.0)
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Ends training earlier than epochs would; with packing it decides alone, as upstream's does",
    )
    learning_rate: float = Field(1e-5, gt=0.0, lt=1.0)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    warmup_steps: int | None = Field(None, ge=0, description="Takes the place of warmupRatio")
    weight_decay: float = Field(0.01, ge=0.0, le=1.0)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    max_grad_norm: float = Field(1.0, ge=0.0, description="0 switches clipping off")
    global_batch_size: int = Field(
        16, ge=1, description="Samples (with packing: packs) in one optimizer step, over all processes"
    )
    micro_batch_size: int = Field(1, ge=1, description="Samples (with packing: packs) in one forward of one process")
    max_seq_length: int = Field(8192, ge=16, description="Tokens; longer rows are a finding")
    precision: Precision = "bf16"
    gradient_checkpointing: bool = True
    group_by_length: bool = Field(False, description="Batches hold rows of like length, so that less is padding")
    packing: Packing = Field(default_factory=Packing)
    loss_weighting: Literal["token", "sample", "square"] = Field(
        "token",
        description="What a token weighs in a row with n supervised ones: 1, 1/n or 1/sqrt(n) "
        "(upstream's loss_reduction)",
    )
    zero_stage: Literal[1, 2, 3] = 1
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Merged over the generated DeepSpeed configuration"
    )
    seed: int = Field(42, ge=0)
    data_workers: int = Field(4, ge=0, le=64, description="Processes that decode and tokenize, for each rank")
    freeze: Freeze = Field(default_factory=Freeze)

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if not self.packing.enabled:
            return self
        if self.group_by_length:
            raise ValueError(
                "groupByLength is true with packing.enabled, whose packs are full anyway; set groupByLength to false"
            )
        if self.packing.max_tokens < self.max_seq_length:
            raise ValueError(
                f"packing.maxTokens {self.packing.max_tokens} is less than maxSeqLength {self.max_seq_length}, so the "
                "longest rows fit in no pack; raise packing.maxTokens or lower maxSeqLength"
            )
        return self


class Retrieval(ApiModel):
    """Settings that only contrastive training has. RECIPE."""

    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Learning rate of a layer: this to the power of its depth below the top (VIT_LAYER_DECAY_RATE and "
        "QLLAMA_LAYER_DECAY_RATE of upstream's scripts)",
    )
    hard_negatives: bool = Field(
        False,
        description="Match each picture with a text of another in the same forward, likelier the more alike, instead "
        "of a random one",
    )


class Checkpoint(ApiModel):
    """Resumable state. RECIPE."""

    every_steps: int = Field(200, ge=1)
    keep: int = Field(2, ge=1, le=100, description="Verified checkpoints kept; older ones are deleted")


class Merge(ApiModel):
    """Whole models made of what training wrote; an empty list leaves a LoRA run's adapter as it is."""

    formats: list[Literal["upstream", "hf"]] = Field(
        default_factory=list, max_length=2, description="upstream: for InternVL's own code; hf: for transformers alone"
    )


class Hub(ApiModel):
    """A repository on the Hugging Face Hub; needs secrets.huggingFace with a token that may write."""

    repository: str = Field(pattern=REPOSITORY_PATTERN, max_length=96, description="owner/name")
    revision: str = Field("main", pattern=REVISION_PATTERN, max_length=100)
    private: bool = Field(True, description="Of a repository that has to be made first")


class Publish(ApiModel):
    """Where results go besides `output`, which always has them."""

    hub: Hub | None = None


class Secrets(ApiModel):
    """Names of Secrets in the CR's namespace; the operator never reads them."""

    object_storage: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        description="Keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_ENDPOINT_URL, AWS_REGION",
    )
    hugging_face: str | None = Field(None, pattern=SECRET_PATTERN, description="Key HF_TOKEN")


class RunPolicy(ApiModel):
    """Life cycle of the run."""

    suspend: bool = Field(False, description="true: checkpoint, free every pod, keep the state")
    backoff_limit: int = Field(3, ge=0, le=100, description="Group restarts after failures of the run itself")
    infrastructure_limit: int = Field(
        20, ge=0, le=1000, description="Group restarts that the cluster caused, since the newest checkpoint"
    )
    on_out_of_memory: Literal["fail", "halveMicroBatch"] = Field(
        "fail",
        description="When a GPU's memory is full in training; halveMicroBatch goes on with half of microBatchSize, and "
        "the same globalBatchSize",
    )
    active_deadline_seconds: int | None = Field(None, ge=1, description="Of the whole run; then it has failed")
    scheduling_deadline_seconds: int | None = Field(
        None, ge=1, description="A group that has not found a node for each pod by then frees those it has"
    )
    start_deadline_seconds: int = Field(
        1800, ge=1, description="A pod that has a node and still no image, Secret or volume by then frees the group's"
    )
    progress_deadline_seconds: int | None = Field(
        None,
        ge=10,
        description="Training that has begun to report, and then gets no further for so long, is started again; must "
        "exceed the longest step, validation, checkpoint and download. Default: only the collectives' own time-outs",
    )
    clean_pod_policy: Literal["Running", "All", "None"] = Field(
        "Running",
        description="Pods that are deleted once the run has finished; None leaves even those that run, with their GPUs",
    )
    ttl_seconds_after_finished: int | None = Field(None, ge=0, description="Then the CR is deleted; artifacts stay")


class Scheduling(ApiModel):
    """Who places the pods of a stage: all at once or none, so that half a group never holds GPUs."""

    gang: Literal["kueue", "volcano", "coscheduling"] | None = Field(
        None, description="kueue: pod groups of a LocalQueue; volcano, coscheduling: a PodGroup for each stage"
    )
    queue: str | None = Field(
        None, pattern=SECRET_PATTERN, max_length=63, description="kueue's LocalQueue (required), or volcano's Queue"
    )
    scheduler_name: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Default: volcano for volcano, scheduler-plugins-scheduler for coscheduling, else the cluster's",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Scheduling":
        if self.gang == "kueue" and self.queue is None:
            raise ValueError("gang: kueue needs queue; set it to a LocalQueue of the run's namespace")
        if self.queue is not None and self.gang not in ("kueue", "volcano"):
            raise ValueError(f"queue {self.queue!r} needs gang: kueue or gang: volcano; set gang, or remove queue")
        return self


class PodTemplate(ApiModel):
    """What every worker pod gets; the shapes are Kubernetes' own."""

    image: str | None = Field(None, min_length=1, description="Trainer image; default: the operator's setting")
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[KubernetesObject] = Field(default_factory=list, max_length=100)
    affinity: KubernetesObject | None = None
    resources: KubernetesObject | None = Field(None, description="Of a training worker; GPUs come from gpusPerWorker")
    priority_class_name: str | None = None
    service_account_name: str | None = None
    runtime_class_name: str | None = None
    image_pull_secrets: list[KubernetesObject] = Field(default_factory=list, max_length=20)
    volumes: list[KubernetesObject] = Field(default_factory=list, max_length=100)
    volume_mounts: list[KubernetesObject] = Field(default_factory=list, max_length=100)
    env: list[KubernetesObject] = Field(default_factory=list, max_length=200)
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    shm_size: str = Field("8Gi", pattern=BYTES_PATTERN, description="Limit of the memory-backed /dev/shm")
    termination_grace_period_seconds: int = Field(
        120, ge=1, le=3600, description="Time to write a checkpoint after SIGTERM"
    )


class InternVLFineTuneSpec(ApiModel):
    """One fine-tuning run, from a base model and data to a published result."""

    recipe: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9-]{0,127}$",
        max_length=128,
        description="Name of a recipe, which supplies defaults; `internvl-trainer recipes` lists all",
    )
    model: Model = Field(default_factory=Model)
    data: Data
    image: Image = Field(default_factory=Image)
    method: Method = "full"
    lora: Lora = Field(default_factory=Lora)
    workers: int = Field(1, ge=1, le=1024, description="Pods of the training group")
    gpus_per_worker: int = Field(0, ge=0, le=16, description="Processes in a pod; 0 trains on the CPU, one process")
    training: Training = Field(default_factory=Training)
    retrieval: Retrieval = Field(default_factory=Retrieval)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    merge: Merge = Field(default_factory=Merge)
    publish: Publish = Field(default_factory=Publish)
    output: str = Field(pattern=OUTPUT_PATTERN, description="Where checkpoints and artifacts go: s3://bucket/prefix")
    secrets: Secrets = Field(default_factory=Secrets)
    run_policy: RunPolicy = Field(default_factory=RunPolicy)
    scheduling: Scheduling = Field(default_factory=Scheduling)
    pod_template: PodTemplate = Field(default_factory=PodTemplate)

    @field_validator("output")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return re.sub(r"/+$", "", value)

    @property
    def processes_per_worker(self) -> int:
        """Training processes in one pod: one a GPU, one on a CPU pod."""
        return max(1, self.gpus_per_worker)

    @property
    def world_size(self) -> int:
        """Training processes over all pods."""
        return self.workers * self.processes_per_worker

    def sources(self) -> Iterator[tuple[str, str]]:
        """Field and address of everything that is read."""
        places = [("spec.model.source", self.model.source), ("spec.data.meta", self.data.meta)]
        for section, entries in (
            ("data.train", self.data.train),
            ("data.validation", self.data.validation),
            ("evaluation.tasks", self.evaluation.tasks),
        ):
            for name, entry in entries.items():
                places += [(f"spec.{section}.{name}.{part}", getattr(entry, part)) for part in ("annotation", "root")]
        return ((field, address) for field, address in places if address is not None)


# Sections whose fields a recipe may supply: the CRD leaves their defaults to `resolve`.
RECIPE_SECTIONS = (
    "model",
    "image",
    "method",
    "lora",
    "workers",
    "gpusPerWorker",
    "training",
    "retrieval",
    "checkpoint",
)
