"""Names and numbers that both the operator and the trainer must agree on."""

from enum import IntEnum

GROUP = "internvl.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InternVLFineTune"
PLURAL = "internvlfinetunes"
SINGULAR = "internvlfinetune"
SHORT_NAME = "ivft"

# Labels on every child; the operator's own watch selects on MANAGED_BY.
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "internvl-operator"
LABEL_JOB = f"{GROUP}/job"  # metadata.name of the owner when it fits a label, else its digest
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_STAGE = f"{GROUP}/stage"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_NODE_RANK = f"{GROUP}/node-rank"
# What a pod was made for, as digests of the user's own words, so that an upgraded operator restarts nothing:
ANNOTATION_RUN_DIGEST = f"{GROUP}/run-digest"  # of what decides the result: spec without the rest
ANNOTATION_POD_DIGEST = f"{GROUP}/pod-digest"  # of podTemplate, secrets, scheduling (runPolicy is in neither)

GPU = "nvidia.com/gpu"  # the resource by which a pod asks for them

# Inside a worker pod.
CONFIG_PATH = "/etc/internvl/run.yaml"
SCRATCH_PATH = "/scratch"  # emptyDir, dies with the pod
CACHE_PATH = "/cache"  # may be shared between the pods of a node
TERMINATION_MESSAGE_PATH = "/dev/termination-log"
TERMINATION_MESSAGE_LIMIT = 4096  # bytes; the kubelet truncates longer ones
MASTER_PORT = 29500
METRICS_PORT = 9400  # /metrics and /progress of a pod's first process; its other processes take the ports above

ENV_ATTEMPT = "INTERNVL_ATTEMPT"
ENV_JOB_UID = "INTERNVL_JOB_UID"
ENV_DEVICE = "INTERNVL_DEVICE"  # cpu: train on the processor, whatever the run asks for
ENV_IMAGE = "INTERNVL_IMAGE"  # the container's image as the pod names it, for the report


class ExitCode(IntEnum):
    """How a stage ends. The numbers are sysexits.h's, so that a shell user can look them up."""

    OK = 0
    INTERNAL = 1
    USER_ERROR = 65  # EX_DATAERR: data, checkpoint or settings the user must correct
    UNAVAILABLE = 69  # EX_UNAVAILABLE: object storage or the network; trying again may help
    REJECTED = 70  # EX_SOFTWARE, the nearest: the work was done, and its result is not good enough to go on
    RESUME = 75  # EX_TEMPFAIL: state was saved; start me again and I go on
    ACCESS_DENIED = 77  # EX_NOPERM: credentials refused
    CONFIG = 78  # EX_CONFIG: run.yaml unreadable or inconsistent
