"""The metadata that all children share."""

from typing import Any

from internvl_api.constants import API_VERSION, KIND

from internvl_operator.core.run import Run


def owned_metadata(run: Run, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Name, namespace, labels, and the owner reference through which Kubernetes deletes the child with its run.

    blockOwnerDeletion is false: true needs the right to update finalizers, and lets one pod on a dead node block a
    foreground deletion of the run.
    """
    return {
        "name": name,
        "namespace": run.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": run.name,
                "uid": run.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }
