"""What we answer: `status` of an InternVLFineTune, and the small documents a pod reports with."""

from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from internvl_api.types import ApiModel

Phase = Literal["Pending", "Running", "Suspended", "Stalled", "Succeeded", "Failed"]
StageName = Literal["preflight", "baseline-evaluate", "train", "evaluate", "merge", "publish"]
StageState = Literal["Pending", "Running", "Succeeded", "Failed", "Skipped"]
StepPhase = Literal["data", "meeting", "computing"]
ConditionType = Literal["Ready", "Reconciling", "Stalled", "Suspended", "Complete", "Failed", "MemoryEstimate"]
# observedGeneration of a run that no operator has answered yet. The API server fills it in: without it, kstatus takes a
# new run for one that is done, and Flux would not wait for it.
UNOBSERVED = -1


class _Answer(ApiModel):
    # A newer operator may have written more than this version knows: read what we know, never crash.
    model_config = ConfigDict(extra="ignore")


class Condition(_Answer):
    """A Kubernetes condition; `kstatus`, Argo CD and Flux read Ready, Reconciling and Stalled."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=128)
    message: str = Field("", max_length=32768)
    last_transition_time: str
    observed_generation: int | None = None


class Progress(_Answer):
    """Where training is. Also the body of the trainer's GET /progress."""

    stage: StageName | None = None
    detail: str | None = Field(None, description="What the stage is doing, in words: downloading, step, checkpoint")
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    slowest_rank: int | None = Field(
        None, description="The others waited for its data, for more than a tenth of the last step; absent: for none"
    )
    validation_loss: float | None = Field(None, description="On data.validation, as last measured")


class Heartbeat(_Answer):
    """Where one training process is in a step; `heartbeat` of the trainer's GET /progress.

    All processes meet once a step, after each has its data: one that is still at its data is waited for by the rest.
    """

    phase: StepPhase
    idle_seconds: float = Field(description="Since it entered that phase")


class CheckpointStatus(_Answer):
    """The newest checkpoint whose manifest was verified."""

    step: int
    uri: str
    sha256: str = Field(description="Of the manifest, which holds the sha256 of each file")
    verified_at: str


class StageStatus(_Answer):
    """One entry of the pipeline."""

    name: StageName
    state: StageState = "Pending"
    attempt: int = 0
    started_at: str | None = None
    finished_at: str | None = None
    reason: str | None = Field(None, description="Why the last attempt ended before the stage was done")
    message: str | None = Field(None, description="The same, in words")
    artifacts: dict[str, str] = Field(default_factory=dict, description="Name to URI of what this stage made")


class Workers(_Answer):
    """Pods of the current stage."""

    active: int = 0
    succeeded: int = 0
    failed: int = 0


class Restarts(_Answer):
    """Group restarts so far, by who caused them; `user` counts against backoffLimit."""

    user: int = 0
    infrastructure: int = 0


class EvaluationStatus(_Answer):
    """Figures by task and metric: {"coco": {"CIDEr": 1.31}}."""

    baseline: dict[str, dict[str, float]] = Field(default_factory=dict)
    final: dict[str, dict[str, float]] = Field(default_factory=dict)


class InternVLFineTuneStatus(_Answer):
    """Written once a pass, only when it changed."""

    observed_generation: int | None = None
    phase: Phase | None = None
    stage: StageName | None = None
    attempt: int = 0
    progress_text: str | None = Field(None, description="For the Progress column: 120/400 loss 1.234")
    conditions: list[Condition] = Field(default_factory=list)
    stages: list[StageStatus] = Field(default_factory=list)
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    evaluation: EvaluationStatus | None = None
    artifacts: dict[str, str] = Field(default_factory=dict, description="Name to URI of what was made or published")
    workers: Workers = Field(default_factory=Workers)
    restarts: Restarts = Field(default_factory=Restarts)
    started_at: str | None = None
    finished_at: str | None = None
    retry_at: str | None = Field(None, description="When a stalled or backed-off group is started again")
    failures: int = Field(0, description="Failures in a row of the current stage; decides the backoff")
    infrastructure_failures: int = Field(
        0, description="Attempts lost to the cluster since the newest checkpoint; count against infrastructureLimit"
    )
    micro_batch_size: int | None = Field(
        None, description="In place of spec's, since a GPU ran out of memory (runPolicy.onOutOfMemory)"
    )
    progress_at: str | None = Field(
        None, description="When the current attempt last got further; progressDeadlineSeconds counts from here"
    )
    unscheduled_since: str | None = Field(
        None, description="When the scheduler began to look for nodes; schedulingDeadlineSeconds counts from here"
    )
    containers: list[str] = Field(
        default_factory=list,
        description="End of the id of each worker's container, by rank, since all of the current attempt ran",
    )
    run_digest: str | None = Field(
        None,
        description="Of the spec that decides the result; another value starts the stages again",
    )

    @field_validator("observed_generation")
    @classmethod
    def _none_before_the_first_answer(cls, value: int | None) -> int | None:
        return None if value == UNOBSERVED else value


class StageResult(_Answer):
    """A stage's last word: the container's termination message (JSON, at most 4096 bytes)."""

    stage: StageName
    outcome: Literal["succeeded", "failed", "resume"]
    reason: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$")
    message: str = ""
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    artifacts: dict[str, str] = Field(default_factory=dict)
    evaluation: EvaluationStatus | None = Field(None, description="What this stage measured")
