"""Names and numbers shared by the operator and the trainer."""

from enum import IntEnum

GROUP = "internvl.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InternVLFineTune"
LOCAL_UID = "local"  # the uid of every run without a cluster, so that the same file always gives the same run.yaml
PLURAL = "internvlfinetunes"
SINGULAR = "internvlfinetune"
SHORT_NAME = "ivft"

# Labels of every child; the operator's watch selects MANAGED_BY.
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "internvl-operator"
LABEL_JOB = f"{GROUP}/job"  # metadata.name of the owner when it fits a label, else its digest
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_STAGE = f"{GROUP}/stage"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_NODE_RANK = f"{GROUP}/node-rank"
# Digests of the spec as written that a pod belongs to; an upgraded operator computes the same, so it restarts nothing.
ANNOTATION_RUN_DIGEST = f"{GROUP}/run-digest"  # of the part that decides the result
ANNOTATION_POD_DIGEST = f"{GROUP}/pod-digest"  # of podTemplate, secrets, scheduling, network and tracking
# Digest of the operator's settings that a pod was made with: an unstarted pod with another one is recreated.
ANNOTATION_DEFAULTS_DIGEST = f"{GROUP}/defaults-digest"
# On a run, "true": take over the children that an earlier run of this name and output left behind.
ANNOTATION_ADOPT = f"{GROUP}/adopt"
# On an adopted child: uids of the runs that it belonged to before, the latest first.
ANNOTATION_ADOPTED_FROM = f"{GROUP}/adopted-from"

GPU = "nvidia.com/gpu"  # resource of GPUs, unless the run or the operator names another
# An extended resource: a domain, a slash and a name.
GPU_RESOURCE_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"

# Inside a worker pod.
CONFIG_FOLDER = "/etc/internvl"
CONFIG_PATH = f"{CONFIG_FOLDER}/run.yaml"
SCRATCH_PATH = "/scratch"  # an emptyDir, deleted with the pod
CACHE_PATH = "/cache"  # can be shared by the pods of a node
SHM_PATH = "/dev/shm"
PVC_ROOT = "/pvc"  # below it the claims of pvc:// sources
DEFAULT_CACHE_GIB = 100
TERMINATION_MESSAGE_PATH = "/dev/termination-log"
TERMINATION_MESSAGE_LIMIT = 4096  # bytes; the kubelet truncates longer ones
MASTER_PORT = 29500
METRICS_PORT = 9400  # /metrics and /progress of a pod's first rank; its other ranks use the ports above

ENV_ATTEMPT = "INTERNVL_ATTEMPT"
ENV_JOB_UID = "INTERNVL_JOB_UID"
ENV_ADOPTED_UIDS = "INTERNVL_ADOPTED_UIDS"  # of earlier runs whose pods this run has adopted, separated by commas
ENV_DEVICE = "INTERNVL_DEVICE"  # cpu: train on the CPU, whatever the run asks for
ENV_ALLOW_PRIVATE_ADDRESSES = "INTERNVL_ALLOW_PRIVATE_ADDRESSES"  # true: https:// sources may be on private addresses
ENV_USAGE = "INTERNVL_USAGE"  # GPU-hours and cost of the run so far (JSON), for the report
ENV_CACHE = "INTERNVL_CACHE"  # folder of the cache outside the operator's pods; in these it is always CACHE_PATH
ENV_CACHE_GIB = "INTERNVL_CACHE_GIB"  # GiB of entries that the cache keeps beside those in use
ENV_IMAGE = "INTERNVL_IMAGE"  # image of the container, for the report
# Reserved for the operator: a run cannot set them.
OPERATOR_ENV = (
    "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK",
    "PET_MASTER_ADDR", "PET_MASTER_PORT", ENV_ATTEMPT, ENV_JOB_UID, ENV_ADOPTED_UIDS, ENV_IMAGE,
    ENV_ALLOW_PRIVATE_ADDRESSES, ENV_USAGE, "HOME", "USER", "TMPDIR",
)  # fmt: skip

# What training says it is doing: the start of `detail` of /progress. The default progress deadline depends on it.
TAKING_STEPS = "training"  # takes steps, and does nothing else
# Moving the model or a checkpoint: their sizes bound the time.
DOWNLOADING = "downloading"
MEASURING = "measuring network and storage"
FETCHING_MODEL = "fetching the model"
NOTING_MODEL = "noting which model it is"
LOADING_MODEL = "loading the model"
STARTING_ENGINE = "starting DeepSpeed"
RESTORING = "looking for a checkpoint"
CHECKPOINTING = "checkpoint at step"
FINISHING_CHECKPOINT = "waiting for the checkpoint of step"
EXPORTING = "exporting"
MOVING_WEIGHTS = (
    DOWNLOADING, MEASURING, FETCHING_MODEL, NOTING_MODEL, LOADING_MODEL, STARTING_ENGINE, RESTORING, CHECKPOINTING,
    FINISHING_CHECKPOINT, EXPORTING,
)  # fmt: skip
# Their time depends on the data, and they report nothing until they are done.
INDEXING = "indexing the data"
READING_PAIRS = "reading the pairs"
VALIDATING = "validating after step"
ANSWERING_SAMPLES = "answering"
# The other ranks must come in time, and the output's lease must be free.
STARTING = "starting"
WAITING_FOR_OTHERS = "waiting for the others"
# What comes before the first step, in order.
SETUP_ORDER = (
    STARTING, WAITING_FOR_OTHERS, MEASURING, FETCHING_MODEL, DOWNLOADING, NOTING_MODEL, LOADING_MODEL, INDEXING,
    READING_PAIRS, STARTING_ENGINE, RESTORING,
)  # fmt: skip

ALREADY_PUBLISHED = "AlreadyPublished"  # reason of a preflight that finds every stage done


class ExitCode(IntEnum):
    """Exit codes of a stage, with the numbers of sysexits.h."""

    OK = 0
    INTERNAL = 1
    USER_ERROR = 65  # EX_DATAERR: data, checkpoint or settings that the user must correct
    UNAVAILABLE = 69  # EX_UNAVAILABLE: object storage or network unavailable; a retry may help
    REJECTED = 70  # EX_SOFTWARE, the nearest: the work is done, but its result is not good enough to continue
    RESUME = 75  # EX_TEMPFAIL: state is saved; start the stage again to continue
    ACCESS_DENIED = 77  # EX_NOPERM: credentials refused
    CONFIG = 78  # EX_CONFIG: run.yaml unreadable or inconsistent
