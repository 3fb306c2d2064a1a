"""Build the NetworkPolicy that keeps strangers away from a run's pods."""

from typing import Any

from internvl_api.constants import LABEL_JOB_UID, METRICS_PORT

from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import names
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run


def build(run: Run, config: OperatorConfig) -> list[dict[str, Any]]:
    """The object to apply; empty when the operator was installed without network policies.

    The run's own pods reach each other on every port, because collectives choose theirs. The configured peers (the
    operator, Prometheus) reach /metrics and /progress of each process. Nobody else reaches anything.
    """
    if config.network_policy_peers is None:
        return []
    own = {"podSelector": {"matchLabels": {LABEL_JOB_UID: run.uid}}}
    ingress: list[dict[str, Any]] = [{"from": [own]}]
    if config.network_policy_peers:  # without peers the rule would admit everybody
        last = METRICS_PORT + run.spec.processes_per_worker - 1
        port = {"protocol": "TCP", "port": METRICS_PORT, "endPort": last}
        ingress.append({"from": list(config.network_policy_peers), "ports": [port]})
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": owned_metadata(run, names.network_policy(run.name), names.shared_labels(run.name, run.uid)),
            "spec": own | {"policyTypes": ["Ingress"], "ingress": ingress},
        }
    ]
