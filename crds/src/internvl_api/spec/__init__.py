"""What a user writes: `spec` of an InternVLFineTune.

`resolve` fills the sections in RECIPE_SECTIONS from the recipe, else from the defaults given here. The CRD carries no
`default` for them: an API server would fill them in, and a recipe could not tell what the user wrote.
"""

from collections.abc import Iterator

from pydantic import Field, field_validator

from internvl_api.spec.data import Data, Dataset, Preflight
from internvl_api.spec.doctor import Doctor
from internvl_api.spec.evaluation import Evaluation
from internvl_api.spec.model import DEFAULT_TILING, Freeze, Image, Lora, Model, Tiling
from internvl_api.spec.network import Network
from internvl_api.spec.pods import PodTemplate, RunPolicy, Scheduling, Secrets
from internvl_api.spec.publish import Hub, Merge, Publish
from internvl_api.spec.tracking import Tracking
from internvl_api.spec.training import (
    Checkpoint,
    EarlyStopping,
    Method,
    Packing,
    Precision,
    Retrieval,
    Samples,
    Training,
)  # fmt: skip
from internvl_api.types import OUTPUT_PATTERN, ApiModel

__all__ = [
    "DEFAULT_TILING", "RECIPE_SECTIONS", "Checkpoint", "Data", "Dataset", "Doctor", "EarlyStopping", "Evaluation",
    "Freeze", "Hub", "Image", "InternVLFineTuneSpec", "Lora", "Merge", "Method", "Model", "Network", "Packing",
    "PodTemplate", "Precision", "Preflight", "Publish", "Retrieval", "RunPolicy", "Samples", "Scheduling", "Secrets",
    "Tiling", "Tracking", "Training",
]  # fmt: skip


class InternVLFineTuneSpec(ApiModel):
    """One fine-tuning run, from a base model and data to a published result; or, with method none, an evaluation."""

    recipe: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9-]{0,127}$",
        max_length=128,
        description="Name of a recipe that supplies defaults; `internvl-trainer recipes` lists all",
    )
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    image: Image = Field(default_factory=Image)
    method: Method = Field(
        "full",
        description="What to train: full (weights), lora (an adapter), head (of a retrieval model only), or none: "
        "evaluate the model alone",
    )
    lora: Lora = Field(default_factory=Lora)
    workers: int = Field(1, ge=1, le=1024, description="Number of pods in a training group")
    min_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Fewest workers that the run may train with when the cluster has no room for all of `workers`. The "
        "global batch stays the same; the run returns to `workers` at a later checkpoint. Default: always `workers`",
    )
    gpus_per_worker: int = Field(
        0, ge=0, le=16, description="Number of GPUs of a worker, one rank each; 0: one rank that trains on the CPU"
    )
    training: Training = Field(default_factory=Training)
    retrieval: Retrieval = Field(default_factory=Retrieval)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    merge: Merge = Field(default_factory=Merge)
    publish: Publish = Field(default_factory=Publish)
    doctor: Doctor = Field(default_factory=Doctor)
    tracking: Tracking | None = Field(
        None, description="Tracker of experiments that the run reports to, beside its own metrics. Default: none"
    )
    output: str = Field(
        "",  # only until the defaults are under it: `check_spec` refuses a spec without one
        pattern=OUTPUT_PATTERN,
        max_length=1024,
        description="Where checkpoints and artifacts go: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix "
        "or an absolute path on a mounted volume. "
        "Default: NAMESPACE/NAME below the outputPrefix of the namespace's or the cluster's defaults (docs/tenants.md)",
    )
    network: Network = Field(default_factory=Network)
    secrets: Secrets = Field(default_factory=Secrets)
    run_policy: RunPolicy = Field(default_factory=RunPolicy)
    scheduling: Scheduling = Field(default_factory=Scheduling)
    pod_template: PodTemplate = Field(default_factory=PodTemplate)

    @field_validator("output")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/")

    @property
    def trains(self) -> bool:
        """Whether the run changes weights; with method none it evaluates alone."""
        return self.method != "none"

    @property
    def processes_per_worker(self) -> int:
        """Ranks in one pod: one for each GPU, or one on the CPU."""
        return max(1, self.gpus_per_worker)

    @property
    def world_size(self) -> int:
        """Ranks over all pods."""
        return self.workers * self.processes_per_worker

    def destinations(self) -> Iterator[tuple[str, str]]:
        """(field, address) of everything the run writes to."""
        yield "spec.output", self.output
        if cache := self.data.preflight.cache:
            yield "spec.data.preflight.cache", cache

    def sources(self) -> Iterator[tuple[str, str]]:
        """(field, address) of everything the run reads."""
        data, dataset = self.data, ("annotation", "questions", "root")
        places = [
            ("spec.model.source", self.model.source),
            ("spec.model.adapter", self.model.adapter),
            ("spec.data.meta", data.meta),
            ("spec.data.metaRoot", data.meta_root),
            ("spec.data.validationMeta", data.validation_meta),
        ]
        for section, entries, parts in (
            ("data.train", data.train, dataset),
            ("data.validation", data.validation, dataset),
            ("evaluation.tasks", self.evaluation.tasks, ("annotation", "root")),
        ):
            for name, entry in entries.items():
                places += [(f"spec.{section}.{name}.{part}", getattr(entry, part)) for part in parts]
        return ((field, address) for field, address in places if address is not None)


# Sections whose fields a recipe may supply; the CRD has no defaults for them.
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
