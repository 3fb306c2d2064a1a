"""Tells Prometheus which pods to scrape, because Debian's build has no Kubernetes discovery.

Run as `python -m ivft_cluster.discovery <kubeconfig> <targets.json>`. The labels are named as Kubernetes discovery
names them, so the scrape configuration reads like any cluster's; Prometheus re-reads the file as soon as it changes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from kubernetes import client, config

from ivft_cluster.watching import Key, follow

META = "__meta_kubernetes_"


def target(pod: Any) -> dict[str, Any] | None:
    """The pod as a file_sd target group, or None while it has no address or no scrape annotation."""
    annotations = pod.metadata.annotations or {}
    if not pod.status.pod_ip or annotations.get("prometheus.io/scrape") != "true":
        return None
    labels = {
        f"{META}namespace": pod.metadata.namespace,
        f"{META}pod_name": pod.metadata.name,
        f"{META}pod_ip": pod.status.pod_ip,
        f"{META}pod_phase": pod.status.phase,
        f"{META}pod_node_name": pod.spec.node_name or "",
    }
    for kind, pairs in (("label", pod.metadata.labels or {}), ("annotation", annotations)):
        labels |= {f"{META}pod_{kind}_{re.sub('[^a-zA-Z0-9_]', '_', key)}": pairs[key] for key in pairs}
    return {"targets": [pod.status.pod_ip], "labels": labels}


def main(kubeconfig: str, path: str) -> None:
    api = config.new_client_from_config(kubeconfig)  # type: ignore[no-untyped-call]
    targets: dict[Key, dict[str, Any] | None] = {}
    file = Path(path)
    written = ""

    def write() -> None:
        nonlocal written
        text = json.dumps([group for group in targets.values() if group], indent=1)
        if text != written:
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            partial.rename(file)
            written = text

    follow(client.CoreV1Api(api).list_pod_for_all_namespaces, targets, target, write)


if __name__ == "__main__":
    main(*sys.argv[1:])
