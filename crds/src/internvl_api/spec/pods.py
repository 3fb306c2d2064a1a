"""The sections of a spec about its pods: `secrets`, `runPolicy`, `scheduling` and `podTemplate`."""

from typing import Annotated, Literal

from pydantic import Field

from internvl_api.constants import GPU_RESOURCE_PATTERN
from internvl_api.spec.kubernetes.container import EnvVar, PullSecret, Resources, VolumeMount
from internvl_api.spec.kubernetes.placement import Affinity, Toleration
from internvl_api.spec.kubernetes.volumes import Volume
from internvl_api.types import ApiModel

BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti)?$"
SECRET_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"

Labels = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=100)]
# All annotations of an object have at most 256 KiB together.
Annotations = Annotated[dict[str, Annotated[str, Field(max_length=16_384)]], Field(max_length=100)]


class Secrets(ApiModel):
    """Names of Secrets in the run's namespace. The operator never reads them."""

    object_storage: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and, where needed, "
        "AWS_ENDPOINT_URL and AWS_REGION; for gs:// GOOGLE_APPLICATION_CREDENTIALS_JSON; for az:// "
        "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    )
    hugging_face: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Secret with the key HF_TOKEN and, for a token that only publishing gets, HF_WRITE_TOKEN",
    )
    tracking: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Secret for spec.tracking, with the key WANDB_API_KEY or SWANLAB_API_KEY; for mlflow "
        "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, where its server asks",
    )


class RunPolicy(ApiModel):
    """Life cycle of the run: suspension, retries, deadlines, clean-up."""

    suspend: bool = Field(False, description="true saves a checkpoint and deletes all pods; false resumes the run")
    backoff_limit: int = Field(
        3, ge=0, le=100, description="Maximum number of restarts of a group after failures of the run itself"
    )
    infrastructure_limit: int = Field(
        20,
        ge=0,
        le=1000,
        description="Maximum number of restarts of a group caused by the cluster, counted since the newest checkpoint",
    )
    on_out_of_memory: Literal["fail", "halveMicroBatch"] = Field(
        "fail",
        description="What to do when a GPU runs out of memory in training: fail, or continue with half of "
        "microBatchSize and the same globalBatchSize",
    )
    active_deadline_seconds: int | None = Field(
        None, ge=1, description="Maximum duration of the run in seconds; when it is exceeded the run fails"
    )
    scheduling_deadline_seconds: int | None = Field(
        None,
        ge=1,
        description="Maximum seconds until every pod of a group is scheduled; then its pods are deleted and tried "
        "again later, with minWorkers at once and with fewer workers. Default: no limit; with minWorkers 60",
    )
    grow_after_seconds: int = Field(
        1800,
        ge=1,
        le=86_400,
        description="Seconds that a run with fewer workers than spec.workers trains before it tries all of them, at "
        "its next checkpoint; each failed try doubles the time, up to a day",
    )
    start_deadline_seconds: int = Field(
        1800,
        ge=1,
        description="Maximum seconds from a pod's scheduling to its start (image, Secrets, volumes); then the "
        "group's pods are deleted and tried again later",
    )
    progress_deadline_seconds: int | None = Field(
        None,
        ge=10,
        description="Maximum seconds without progress once training reports it; then training restarts from the newest "
        "checkpoint. Must exceed the longest step, validation, checkpoint and download. Default: while it takes steps, "
        "20 times the mean step, at least 1800; 7200 for the first step of an attempt. While it fetches, loads, "
        "restores, stores or exports weights of a known model on GPUs: 3600 and the time to move the model and a "
        "node's share of a checkpoint at 50 MB/s, or at half of the measured rate of a slower storage. Otherwise none",
    )
    clean_pod_policy: Literal["Running", "All", "None"] = Field(
        "Running",
        description="Which pods to delete when the run finishes; None keeps even running pods, and their GPUs",
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, description="Seconds after the run finishes until its resource is deleted; artifacts stay"
    )


class Scheduling(ApiModel):
    """Gang scheduling: place all pods of a stage at once or none, so that half a group never holds GPUs."""

    gang: Literal["kueue", "volcano", "coscheduling"] | None = Field(
        None, description="kueue: pod groups in a LocalQueue; volcano, coscheduling: one PodGroup for each stage"
    )
    queue: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=63,
        description="LocalQueue of kueue (required there), or volcano's Queue",
    )
    scheduler_name: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Scheduler of the pods; default: volcano for volcano, scheduler-plugins-scheduler for "
        "coscheduling, else the cluster's",
    )


class StageResources(ApiModel):
    """Requests and limits of the pods of single stages, in Kubernetes' own format."""

    preflight: Resources | None = Field(None, description="Requests and limits of a preflight pod")
    evaluate: Resources | None = Field(
        None,
        description="Requests and limits of a worker in baseline-evaluate and evaluate; default: podTemplate.resources",
    )
    score: Resources | None = Field(None, description="Requests and limits of a baseline-score or score pod")
    merge: Resources | None = Field(None, description="Requests and limits of the merge pod")
    publish: Resources | None = Field(None, description="Requests and limits of the publish pod")

    def of(self, stage: str) -> Resources | None:
        """The resources given for a stage; None when there are none."""
        given: Resources | None = getattr(self, stage_field(stage), None)
        return given


def stage_field(stage: str) -> str:
    """The field of `stageResources` about a stage: evaluations share one, scorings too; train and doctor have none.

    >>> stage_field("baseline-evaluate")
    'evaluate'
    """
    return stage.removeprefix("baseline-")


class PodTemplate(ApiModel):
    """Settings of every worker pod; their parts have Kubernetes' own format."""

    image: str | None = Field(
        None, min_length=1, max_length=1024, description="Trainer image; default: the operator's setting"
    )
    gpu_resource: str | None = Field(
        None,
        pattern=GPU_RESOURCE_PATTERN,
        max_length=317,
        description="Resource of which a worker gets gpusPerWorker, such as amd.com/gpu or nvidia.com/mig-3g.40gb; "
        "default: the operator's setting, else nvidia.com/gpu",
    )
    gpu_claim_template: str | None = Field(
        None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="ResourceClaimTemplate of the namespace whose claim has the gpusPerWorker GPUs of a worker "
        "(dynamic resource allocation), in place of gpuResource",
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels that a pod's node must have")
    cpu_node_selector: Labels | None = Field(
        None,
        description="Labels that the node of a stage without GPUs must have, such as preflight and publish; "
        "default: nodeSelector",
    )
    tolerations: list[Toleration] = Field(
        default_factory=list, max_length=100, description="Node taints that the pods tolerate"
    )
    affinity: Affinity | None = Field(None, description="Affinity of the pods to nodes and to other pods")
    resources: Resources | None = Field(
        None,
        description="Requests and limits of a training worker; set GPUs with gpusPerWorker. Default: requests derived "
        "from model, method and data settings (docs/scheduling.md)",
    )
    stage_resources: StageResources = Field(
        default_factory=StageResources,
        description="Requests and limits of other stages. Without them, preflight, merge and publish request what the "
        "operator's settings say, else what is derived from the model, with the limits of cpu (at least 1) and memory "
        "(at least 4Gi) in `resources`",
    )
    priority_class_name: str | None = Field(None, max_length=253, description="PriorityClass of the pods")
    service_account_name: str | None = Field(None, max_length=253, description="ServiceAccount of the pods")
    runtime_class_name: str | None = Field(None, max_length=253, description="RuntimeClass of the pods")
    image_pull_secrets: list[PullSecret] = Field(
        default_factory=list,
        max_length=20,
        description="Names of Secrets for the image's registry, as [{name: registry}]",
    )
    volumes: list[Volume] = Field(default_factory=list, max_length=100, description="Volumes added to the pods")
    volume_mounts: list[VolumeMount] = Field(
        default_factory=list,
        max_length=100,
        description="Where the trainer's container mounts volumes; at /scratch, /cache or /dev/shm instead of the "
        "operator's own",
    )
    env: list[EnvVar] = Field(
        default_factory=list,
        max_length=200,
        description="Environment variables added to the trainer's container; not those that the operator sets itself",
    )
    labels: Labels = Field(default_factory=dict, description="Labels added to the pods")
    annotations: Annotations = Field(default_factory=dict, description="Annotations added to the pods")
    shm_size: str | None = Field(
        None,
        pattern=BYTES_PATTERN,
        max_length=32,
        description="Size limit of the memory-backed /dev/shm; default: 8Gi, or more where the batches that data "
        "workers prepare ahead need it",
    )
    termination_grace_period_seconds: int | None = Field(
        None,
        ge=1,
        le=3600,
        description="Seconds that a pod has after SIGTERM to save a checkpoint. Default: 120, or more where a step and "
        "a worker's share of the checkpoint take longer (docs/checkpoints.md)",
    )
