"""Build the headless Service that gives every worker its host name."""

from typing import Any

from internvl_api.constants import LABEL_JOB_UID, MASTER_PORT, METRICS_PORT

from internvl_operator.core.resources import names
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run


def build(run: Run) -> dict[str, Any]:
    """The object to apply. Addresses are published before readiness: workers need them while they start."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": owned_metadata(run, names.service(run.name), names.shared_labels(run.name, run.uid)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_JOB_UID: run.uid},
            "ports": [_port("rendezvous", MASTER_PORT), _port("metrics", METRICS_PORT)],
        },
    }


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "port": number, "targetPort": number, "protocol": "TCP"}
