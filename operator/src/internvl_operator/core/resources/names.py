"""Every name and identifying label, each made by one function of the run and the worker."""

import hashlib
import re

from internvl_api.constants import (
    LABEL_ATTEMPT,
    LABEL_JOB,
    LABEL_JOB_UID,
    LABEL_MANAGED_BY,
    LABEL_NODE_RANK,
    LABEL_STAGE,
    MANAGED_BY,
)

LABEL_LIMIT = 63  # characters of a DNS label, and of a label value
# Leaves room for "-baseline-evaluate-1023", so that every pod name is a DNS label (it is also the pod's hostname).
BASE_LIMIT = 38
_DIGEST = 8
# Runs whose names could be read as another run's name and stage, or as a shortened name. They get a digest.
_AMBIGUOUS = re.compile(rf"-(?:baseline|[0-9a-f]{{{_DIGEST}}})$")


def base(run: str) -> str:
    """A DNS label prefix for the run: its name when that is short and unambiguous, else a shortened name with a digest.

    No two runs have the same worker name: `x`, baseline-evaluate and `x-baseline`, evaluate would.

    >>> base("coco-lora"), base("v1.5"), base("x-baseline")
    ('coco-lora', 'v1-5-23a9684d', 'x-baseline-bac1a4ef')
    """
    cleaned = re.sub(r"[^a-z0-9-]", "-", run)
    if cleaned == run and len(run) <= BASE_LIMIT and not _AMBIGUOUS.search(run):
        return run
    return f"{cleaned[: BASE_LIMIT - _DIGEST - 1].rstrip('-')}-{_digest(run)}"


def pod(run: str, stage: str, rank: int) -> str:
    """Name and hostname of one worker."""
    return f"{base(run)}-{stage}-{rank}"


def service(run: str) -> str:
    """The headless Service of all groups. The prefix avoids a user's own Service and a leading digit."""
    return f"ivft-{base(run)}"


def config_map(run: str) -> str:
    """The ConfigMap with run.yaml."""
    return f"ivft-{base(run)}"


def network_policy(run: str) -> str:
    """The NetworkPolicy of all groups."""
    return f"ivft-{base(run)}"


def pod_group(run: str, stage: str) -> str:
    """volcano's and coscheduling's PodGroup of a stage."""
    return f"ivft-{base(run)}-{stage}"


def queue_group(run: str, stage: str, attempt: int) -> str:
    """Kueue's pod group, admitted for each attempt. Both a label value and an object name."""
    return f"{base(run)}-{stage}-{attempt}"


def master_address(run: str, stage: str) -> str:
    """Host name of node rank 0, resolved through the headless Service and the pod's DNS search path."""
    return f"{pod(run, stage, 0)}.{service(run)}"


def run_label(run: str) -> str:
    """The run's name as a label value: itself when it fits, else shortened with a digest."""
    return run if len(run) <= LABEL_LIMIT else f"{run[: LABEL_LIMIT - _DIGEST - 1].rstrip('-.')}-{_digest(run)}"


def shared_labels(run: str, uid: str) -> dict[str, str]:
    """Labels of every child."""
    return {LABEL_MANAGED_BY: MANAGED_BY, LABEL_JOB: run_label(run), LABEL_JOB_UID: uid}


def worker_labels(run: str, uid: str, stage: str, attempt: int, rank: int) -> dict[str, str]:
    """Labels of a pod."""
    return shared_labels(run, uid) | {LABEL_STAGE: stage, LABEL_ATTEMPT: str(attempt), LABEL_NODE_RANK: str(rank)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
