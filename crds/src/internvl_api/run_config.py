"""What a stage reads: run.yaml, written by the operator, or by hand for a single machine."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from internvl_api.address import WHOLE, Addressed
from internvl_api.models.kinds import ModelKind
from internvl_api.spec import (
    Checkpoint,
    Data,
    Doctor,
    Evaluation,
    Image,
    Lora,
    Merge,
    Method,
    Network,
    Precision,
    Publish,
    Retrieval,
    Tracking,
    Training,
)  # fmt: skip
from internvl_api.types import ApiModel, Template
from internvl_api.validation import cross_field, entry_names, evaluation, evaluation_alone, row_sizes, tracking
from internvl_api.validation.cel_rules import broken

# What also refuses a run.yaml written by hand: the rules about one section, and what an evaluation alone needs.
_SECTION_RULES = (
    tuple(
        rule
        for rule in (*entry_names.RULES, *cross_field.RULES, *row_sizes.RULES, *evaluation.RULES)
        if rule in evaluation.HELD_OUT_RULES or rule.at.partition(".")[0] in ("data", "image", "training", "evaluation")
    )
    + tracking.RULES
    + evaluation_alone.RUN_CONFIG_RULES
)


class ResolvedModel(ApiModel):
    """The base model; only what the checkpoint itself says is still open."""

    name: str | None = None
    kind: ModelKind = "chat"
    source: Addressed
    adapter: Addressed | None = Field(None, description="Adapter to evaluate on the base model, with method none")
    template: Template | None = Field(
        None, description="Conversation template; None: the one in the checkpoint's config.json"
    )
    drop_path_rate: float = 0.0
    resize_embeddings: bool = False


class RunConfig(ApiModel):
    """Everything a stage needs. Global batch = micro batch x gradient accumulation x world size."""

    job: str = Field(description="namespace/name, for logs and reports")
    job_uid: str = Field(description="uid of the run's resource, or any id on a single machine")
    recipe: str | None = None
    model: ResolvedModel
    data: Data
    image: Image
    method: Method
    lora: Lora
    training: Training
    retrieval: Retrieval = Field(default_factory=Retrieval)
    checkpoint: Checkpoint
    evaluation: Evaluation = Field(default_factory=Evaluation)
    merge: Merge = Field(default_factory=Merge)
    publish: Publish = Field(default_factory=Publish)
    doctor: Doctor = Field(default_factory=Doctor)
    network: Network = Field(default_factory=Network)
    tracking: Tracking | None = None
    output: str
    workers: int = Field(ge=1)
    processes_per_worker: int = Field(ge=1)
    device: Literal["cuda", "cpu"]
    gradient_accumulation: int = Field(ge=1)
    grace_seconds: int | None = Field(
        None, ge=1, description="Seconds from SIGTERM until a training worker is killed; None: no limit"
    )
    allow_private_addresses: bool | None = Field(
        None,
        description="Whether https:// sources may be on private and loopback addresses; default: the variable "
        "INTERNVL_ALLOW_PRIVATE_ADDRESSES, which the operator sets",
    )

    @model_validator(mode="after")
    def _sections_are_consistent(self) -> "RunConfig":
        for violation in broken(_SECTION_RULES, self, path=""):
            raise ValueError(f"{violation.field}: {violation.message}")
        return self

    @property
    def trains(self) -> bool:
        """Whether the run changes weights; with method none it evaluates alone."""
        return self.method != "none"

    @property
    def world_size(self) -> int:
        """Ranks over all pods."""
        return self.workers * self.processes_per_worker

    @property
    def validation_every(self) -> int:
        """Steps between two losses on data.validation."""
        return self.evaluation.every_steps or self.checkpoint.every_steps

    @property
    def precision(self) -> Precision:
        """Number format of weights and activations; optimizer state is always fp32."""
        return self.training.precision

    def to_yaml(self, *, reveal: bool = False) -> str:
        """The text of run.yaml. Equal configurations have equal text.

        With `reveal`, addresses keep their queries: for the file that a stage reads, never for one that is published.
        """
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True, context=WHOLE if reveal else None)
        # libyaml: PyYAML's Python emitter took a quarter of the time of all passes
        return yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=True, allow_unicode=True)

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read run.yaml; raises OSError, yaml.YAMLError or pydantic.ValidationError."""
        return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
