"""What a stage reads: run.yaml, resolved once by the operator (or written by hand for a single machine)."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from internvl_api.spec import Checkpoint, Data, Image, Lora, Merge, Method, Precision, Publish, Retrieval, Training
from internvl_api.spec.evaluation import Evaluation
from internvl_api.types import ApiModel, Template


class ResolvedModel(ApiModel):
    """The base model, with nothing left to look up but what only the checkpoint knows."""

    name: str | None = None
    kind: Literal["chat", "retrieval"] = "chat"
    source: str
    template: Template | None = Field(None, description="None: the checkpoint's config.json decides")
    drop_path_rate: float = 0.0


class RunConfig(ApiModel):
    """Everything a stage needs. `batch` figures are derived: global = micro x accumulation x world size."""

    job: str = Field(description="namespace/name, for logs and reports")
    job_uid: str = Field(description="Lineage: the CR's uid, or any id for a local run")
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
    output: str
    workers: int = Field(ge=1)
    processes_per_worker: int = Field(ge=1)
    device: Literal["cuda", "cpu"]
    gradient_accumulation: int = Field(ge=1)

    @property
    def world_size(self) -> int:
        """Training processes over all pods."""
        return self.workers * self.processes_per_worker

    @property
    def precision(self) -> Precision:
        """Number format of weights and activations; optimizer state is always fp32."""
        return self.training.precision

    def to_yaml(self) -> str:
        """The text of run.yaml: stable, so that equal configurations have equal digests."""
        # libyaml's emitter: with that of Python, a quarter of the time of all passes went here
        return yaml.dump(self.to_dict(), Dumper=yaml.CSafeDumper, sort_keys=True, allow_unicode=True)

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read run.yaml; raises OSError, yaml.YAMLError or pydantic.ValidationError."""
        return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
