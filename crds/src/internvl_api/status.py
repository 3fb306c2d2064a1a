"""What the operator writes, `status` of an InternVLFineTune, and the documents that a pod reports with."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator

from internvl_api.types import ApiModel

Phase = Literal["Pending", "Running", "Suspended", "Stalled", "Succeeded", "Failed"]
StageName = Literal[
    "preflight", "doctor", "baseline-evaluate", "baseline-score", "train", "evaluate", "score", "merge", "publish"
]
StageState = Literal["Pending", "Running", "Succeeded", "Failed", "Skipped"]
StepPhase = Literal["data", "meeting", "computing"]
ConditionType = Literal[
    "Ready",
    "Reconciling",
    "Stalled",
    "Suspended",
    "Complete",
    "Failed",
    "MemoryEstimate",
    "ResourceEstimate",
    "NetworkEstimate",
]
ATTEMPTS_LISTED = 10  # attempts of a stage that status lists; of earlier ones it keeps the GPU-seconds
# observedGeneration of a run that no operator has seen yet. The API server fills it in: without it, kstatus takes a new
# run for a finished one, and Flux does not wait for it.
UNOBSERVED = -1


Time = Annotated[str, Field(max_length=64)]  # RFC 3339
Uri = Annotated[str, Field(max_length=8192)]
Text = Annotated[str, Field(max_length=32_768)]  # as of a condition's message
DefaultsText = Annotated[str, Field(max_length=16_384)]  # YAML
Word = Annotated[str, Field(max_length=256)]
Metrics = Annotated[dict[str, float], Field(max_length=1000)]
# Bytes per second. Pods report them: a number outside these bounds is no measurement.
Rate = Annotated[float, Field(strict=True, ge=1, le=1e15)]
Artifacts = Annotated[dict[str, Uri], Field(max_length=10_000)]


class _Reported(ApiModel):
    # A newer operator may have written fields that this version does not know: ignore them.
    model_config = ConfigDict(extra="ignore")


class Condition(_Reported):
    """A Kubernetes condition; kstatus, Argo CD and Flux read Ready, Reconciling and Stalled."""

    type: ConditionType = Field(description="Name of the condition")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds")
    reason: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=128, description="Cause, as one CamelCase word")
    message: str = Field("", max_length=32768, description="Details: what, where, found, expected, next step")
    last_transition_time: Time = Field(description="When `status` last changed")
    observed_generation: int | None = Field(None, description="metadata.generation that the condition is about")


class Bandwidth(_Reported):
    """What an attempt at training measures at its start; each checkpoint measures `storageWrite` again."""

    all_reduce: Rate | None = Field(
        None, description="Bus bandwidth of an all-reduce over all ranks, as nccl-tests counts it (busbw)"
    )
    storage_write: Rate | None = Field(None, description="Bytes per second that the slowest node writes to spec.output")
    storage_read: Rate | None = Field(None, description="Bytes per second that the slowest node reads from spec.output")


class Progress(_Reported):
    """Progress of the current stage; also the body of the trainer's GET /progress."""

    stage: StageName | None = Field(None, description="Stage that reports")
    detail: Text | None = Field(None, description="Current activity of the stage: downloading, step, checkpoint")
    step: int | None = Field(None, description="Steps done")
    total_steps: int | None = Field(None, description="Steps in all")
    epoch: float | None = Field(None, description="Passes over the training data done")
    loss: float | None = Field(None, description="Training loss of the last logged step")
    learning_rate: float | None = Field(None, description="Learning rate of the last logged step")
    samples_per_second: float | None = Field(None, description="Samples per second, over all ranks")
    tokens_per_second: float | None = Field(None, description="Tokens per second, over all ranks")
    eta_seconds: float | None = Field(None, description="Estimated seconds until training ends")
    slowest_rank: int | None = Field(
        None,
        description="Rank whose data the other ranks waited for during more than a tenth of the last step; absent when "
        "there is none",
    )
    validation_loss: float | None = Field(None, description="Latest loss on data.validation")
    best_step: int | None = Field(None, description="Step with the lowest loss on data.validation so far")
    best_validation_loss: float | None = Field(None, description="Lowest loss on data.validation so far")
    exported_step: int | None = Field(None, description="Step whose weights were exported, once they are")
    ended_early: Text | None = Field(
        None, description="Why training ended before its last step (training.earlyStopping); absent otherwise"
    )
    peak_memory_bytes: int | None = Field(
        None, description="Most memory that the reporting container used at a report, without the page cache"
    )
    peak_gpu_memory_bytes: int | None = Field(
        None, description="Most memory that torch reserved on the GPU of the reporting process, in training"
    )
    bandwidth: Bandwidth | None = Field(None, description="Bandwidths that training measured")
    tracking_problem: Text | None = Field(
        None, description="Why the tracker of spec.tracking lacks figures of this stage; the stage goes on without it"
    )
    warning: Text | None = Field(
        None, description="First warning of training, `Reason: message`; training goes on, and its result may be bad"
    )


class Heartbeat(_Reported):
    """Where one rank is in a step; `heartbeat` in the trainer's GET /progress.

    All ranks synchronise once a step, after loading their data: the others wait for a rank that is still loading.
    """

    phase: StepPhase = Field(description="Current part of the step")
    idle_seconds: float = Field(description="Seconds since the rank entered that phase")


class CheckpointStatus(_Reported):
    """The newest checkpoint with a verified manifest."""

    step: int = Field(description="Step at which it was saved")
    uri: Uri = Field(description="Folder of the checkpoint")
    sha256: Word = Field(description="sha256 of the manifest, which holds the sha256 of each file")
    verified_at: Time = Field(description="When the checkpoint was verified")


class AttemptStatus(_Reported):
    """One attempt of a stage."""

    number: int = Field(description="Number of the attempt")
    gpus: int = Field(0, description="Number of GPUs that the pods of the attempt request")
    started_at: Time = Field(description="When the first pod of the attempt was on a node")
    finished_at: Time | None = Field(None, description="When the attempt ended; absent while it lasts")
    reason: Word | None = Field(None, description="How the attempt ended, as one word")


class StageStatus(_Reported):
    """State of one stage."""

    name: StageName = Field(description="Name of the stage")
    state: StageState = Field("Pending", description="State of the stage")
    attempt: int = Field(0, description="Number of the current or last attempt")
    started_at: Time | None = Field(None, description="When the first attempt started")
    finished_at: Time | None = Field(None, description="When the stage finished")
    reason: Word | None = Field(None, description="Why the last attempt ended before the stage was done, as one word")
    message: Text | None = Field(
        None,
        description="Why the last attempt ended before the stage was done, in detail; of a stage that is done, its "
        "warning, and why training ended early",
    )
    artifacts: Artifacts = Field(default_factory=dict, description="Name -> URI of what the stage wrote")
    attempts: list[AttemptStatus] | None = Field(
        None, max_length=ATTEMPTS_LISTED, description="The newest attempts that had a pod on a node, oldest first"
    )
    earlier_gpu_seconds: int | None = Field(
        None, description="GPU-seconds of the attempts before those in `attempts`; absent without any"
    )


class Workers(_Reported):
    """Pods of the current stage."""

    active: int = Field(0, description="Number of pods that are pending or running")
    succeeded: int = Field(0, description="Number of pods that succeeded")
    failed: int = Field(0, description="Number of pods that failed")


class ElasticStatus(_Reported):
    """Size of the groups of a run with minWorkers that does not have all of its workers."""

    workers: int = Field(description="Number of workers in a group")
    wanted: int = Field(description="spec.workers")
    reason: Word = Field(description="Why there are fewer, as one word")
    message: Text = Field(description="Why there are fewer, in detail")
    grow_at: Time | None = Field(
        None, description="Time after which the run tries all workers again, at its next checkpoint"
    )
    checkpoint_step: int | None = Field(
        None, description="Step of the newest checkpoint when the groups got this size; they grow after a later one"
    )
    failed_growths: int = Field(0, description="Consecutive tries with all workers that failed; each doubles the wait")
    growing_from: int | None = Field(
        None, description="Number of workers before the present try with all of them; absent when none is in progress"
    )


class Restarts(_Reported):
    """Number of group restarts, by cause."""

    user: int = Field(0, description="Restarts caused by the run itself; they count against backoffLimit")
    infrastructure: int = Field(0, description="Restarts caused by the cluster")


class EvaluationStatus(_Reported):
    """Metrics by task: {"coco": {"CIDEr": 1.31}}."""

    baseline: dict[str, Metrics] = Field(
        default_factory=dict, max_length=1000, description="Task -> metric -> value of the base model"
    )
    final: dict[str, Metrics] = Field(
        default_factory=dict, max_length=1000, description="Task -> metric -> value of the trained model"
    )


class Usage(_Reported):
    """What the attempts that have ended used."""

    gpu_hours: float = Field(description="GPUs times hours, of all stages")
    cost: float | None = Field(None, description="GPU-hours times the administrator's price; absent without one")
    currency: Word | None = Field(None, description="Currency of the cost")


class Notice(_Reported):
    """The last notice to the administrator's webhooks."""

    id: Word = Field(description="Id of the notice, the same each time it is sent")
    type: Literal["Complete", "Failed", "Stalled"] = Field(description="Condition that it is about")
    reason: Word = Field(description="Cause, as one CamelCase word")
    message: Text = Field(description="Message of the condition")
    at: Time = Field(description="When the condition became True")
    delivered_at: Time | None = Field(None, description="When every receiver had taken it; absent until then")


class DefaultsStatus(_Reported):
    """The defaults that the run's pods were made with; those of a stage that runs do not change."""

    namespace: DefaultsText | None = Field(
        None, description="Defaults of the namespace: defaults.yaml of the ConfigMap internvl-defaults"
    )
    cluster: DefaultsText | None = Field(None, description="Defaults of the cluster, from the operator's chart")
    output: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Output of a run without spec.output; fixed once a stage has results"
    )


class InternVLFineTuneStatus(_Reported):
    """Observed state of the run; the operator writes it once a pass, and only when it changed."""

    observed_generation: int | None = Field(
        None, description="metadata.generation that this status is about; -1 until an operator sees the run"
    )
    phase: Phase | None = Field(None, description="Summary of the conditions")
    stage: StageName | None = Field(None, description="Current stage")
    attempt: int = Field(0, description="Number of the current stage's attempt")
    progress_text: Text | None = Field(None, description="Text of the Progress column: 120/400 loss 1.234")
    conditions: list[Condition] = Field(default_factory=list, max_length=32, description="Conditions by type")
    stages: list[StageStatus] = Field(
        default_factory=list, max_length=32, description="Stages of the run in their order"
    )
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    evaluation: EvaluationStatus | None = None
    artifacts: Artifacts = Field(
        default_factory=dict, description="Name -> URI of everything that was written or published"
    )
    workers: Workers = Field(default_factory=Workers)
    elastic: ElasticStatus | None = None
    restarts: Restarts = Field(default_factory=Restarts)
    usage: Usage | None = None
    notice: Notice | None = None
    started_at: Time | None = Field(None, description="When the run started")
    finished_at: Time | None = Field(None, description="When the run succeeded or failed")
    retry_at: Time | None = Field(None, description="When a stalled or failed group is started again")
    failures: int = Field(0, description="Consecutive failures of the current stage; sets the backoff")
    infrastructure_failures: int = Field(
        0,
        description="Attempts lost to the cluster since the newest checkpoint; they count against infrastructureLimit",
    )
    micro_batch_size: int | None = Field(
        None,
        description="Micro batch size after a GPU ran out of memory (runPolicy.onOutOfMemory); overrides the spec",
    )
    progress_at: Time | None = Field(
        None, description="When the current attempt last made progress; progressDeadlineSeconds counts from here"
    )
    unscheduled_since: Time | None = Field(
        None, description="When the scheduler began to look for nodes; schedulingDeadlineSeconds counts from here"
    )
    containers: list[Word] = Field(
        default_factory=list,
        max_length=1024,
        description="Last characters of each worker's container id, by rank, once the whole attempt runs; they reveal "
        "a container that its node restarted",
    )
    node_failures: dict[Word, int] = Field(
        default_factory=dict,
        max_length=100,
        description="Node -> attempts of this run that its failure ended, two for a broken GPU; new pods avoid a node "
        "from 2 on",
    )
    lost_nodes: list[Word] = Field(
        default_factory=list,
        max_length=1024,
        description="Nodes that were gone when the last attempt ended; the pods of the current one avoid them",
    )
    defaults: DefaultsStatus | None = None
    run_digest: Word | None = Field(
        None, description="Digest of the part of the spec that decides the result; a change restarts the stages"
    )

    @field_validator("observed_generation")
    @classmethod
    def _none_before_first_pass(cls, value: int | None) -> int | None:
        return None if value == UNOBSERVED else value


class StageResult(_Reported):
    """A stage's last word: the container's termination message (JSON, at most 4096 bytes)."""

    stage: StageName = Field(description="Stage that ended")
    outcome: Literal["succeeded", "failed", "resume"] = Field(description="How the stage ended")
    reason: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$", description="Cause, as one CamelCase word")
    message: str = Field("", description="Details of the cause")
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    artifacts: dict[str, str] = Field(default_factory=dict, description="Name -> URI of what the stage wrote")
    evaluation: EvaluationStatus | None = Field(None, description="Metrics that the stage measured")
