"""Measures the time from `kubectl apply` to the first worker pod object. It asserts no limits."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from controller.builders import result
from controller.operator_process import SELECTOR, Cluster, OperatorProcess
from internvl_api.constants import LABEL_STAGE
from ivft_cluster.fake_kubelet import FakeKubelet
from kubernetes import watch
from rich.console import Console
from rich.table import Table
from urllib3.exceptions import HTTPError

RUNS = 50


def bench_first_pod(cluster_of_test: Cluster, kubelet: FakeKubelet, tmp_path: Path) -> None:
    """50 CRs in sequence: from apply to the first pod object, and from preflight's end to the first training worker."""
    with OperatorProcess(cluster_of_test, tmp_path, RETRY_BASE_SECONDS="10"):
        first_pod, first_worker = _measure(cluster_of_test, kubelet)
    table = Table(title=f"{RUNS} runs, real API server, fake nodes; milliseconds")
    for column in ("from", "to", "p50", "p99", "max"):
        table.add_column(column)
    for begin, end, seconds in (
        ("apply", "first pod object (preflight)", first_pod),
        ("preflight succeeded", "first training worker object", first_worker),
    ):
        p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100, method="inclusive")[98]
        table.add_row(begin, end, *(f"{1000 * each:.0f}" for each in (p50, p99, max(seconds))))
    Console().print(table)


def _measure(cluster: Cluster, kubelet: FakeKubelet) -> tuple[list[float], list[float]]:
    seen: dict[tuple[str, str], float] = {}
    arrived = threading.Condition()

    def follow() -> None:
        listing = cluster.core.list_namespaced_pod
        with contextlib.suppress(HTTPError):  # the API server stops before this thread
            record(listing)

    def record(listing: Any) -> None:
        for event in watch.Watch().stream(listing, cluster.namespace, label_selector=SELECTOR, timeout_seconds=600):
            meta = event["object"].metadata
            if event["type"] == "ADDED":
                with arrived:
                    key = (meta.owner_references[0].name, meta.labels[LABEL_STAGE])
                    seen.setdefault(key, time.monotonic())
                    arrived.notify_all()

    threading.Thread(target=follow, daemon=True).start()

    def until(job: str, stage: str, since: float) -> float:
        with arrived:
            assert arrived.wait_for(lambda: (job, stage) in seen, timeout=60), f"{job}: no {stage} pod after 60 s"
            return seen[job, stage] - since

    first_pod, first_worker = [], []
    for number in range(RUNS):
        job = f"bench-{number}"
        began = time.monotonic()
        cluster.create(job)
        first_pod.append(until(job, "preflight", began))
        kubelet.wait_phase(cluster.namespace, f"{job}-preflight-0")
        began = time.monotonic()
        kubelet.finish(cluster.namespace, f"{job}-preflight-0", message=json.dumps(result("preflight")))
        first_worker.append(until(job, "train", began))
    return first_pod, first_worker
