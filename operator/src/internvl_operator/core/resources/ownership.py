"""The metadata every child has in common."""

from typing import Any

from internvl_api.constants import API_VERSION, KIND

from internvl_operator.core.run import Job


def owned_metadata(job: Job, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Name, namespace, labels and the reference by which Kubernetes deletes the child with its job.

    blockOwnerDeletion is false: true would need the right to update finalizers, and would let one pod on a dead
    node hold up a foreground deletion of the job.
    """
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job.name,
                "uid": job.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }
