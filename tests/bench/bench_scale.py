"""Measures the operator with thousands of runs on a real API server with fake nodes. It asserts no limits.

Sizes are environment variables: SCALE_JOBS (1000), SCALE_MANY (5000), SCALE_FOREIGN (50000), SCALE_SECONDS (60).
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from controller.builders import result
from controller.operator_process import SELECTOR, Cluster, OperatorProcess
from internvl_api.constants import LABEL_STAGE
from ivft_cluster.fake_kubelet import Behaviour, Exit, FakeKubelet, Run
from ivft_cluster.shell import wait_for
from kubernetes import watch
from rich.console import Console
from rich.table import Table
from urllib3.exceptions import HTTPError

JOBS, MANY, FOREIGN, SECONDS = (
    int(os.environ.get(f"SCALE_{name}", default))
    for name, default in (("JOBS", 1000), ("MANY", 5000), ("FOREIGN", 50_000), ("SECONDS", 60))
)
WORKERS = 4
QUIET = 10  # seconds without a write that count as steady state
# Production settings; the tests' own are faster.
SETTINGS = {"RETRY_BASE_SECONDS": "10", "SETTLE_SECONDS": "5", "PROGRESS_INTERVAL_SECONDS": "5", "NAMESPACES": ""}
LONG = 3600.0


def bench_one_a_second(cluster_of_test: Cluster, tmp_path: Path) -> None:
    """One run a second for SECONDS: time from apply to first pod. Comes first: later the API server cleans up."""
    with (
        _kubelet(cluster_of_test),
        OperatorProcess(cluster_of_test, tmp_path, **SETTINGS),
        _pod_times(cluster_of_test) as seen,
    ):
        applied = {}
        for number in range(SECONDS):
            due = time.monotonic() + 1
            applied[f"run-{number}"] = time.monotonic()
            cluster_of_test.create(f"run-{number}", workers=WORKERS)
            time.sleep(max(0.0, due - time.monotonic()))
        wait_for("every run has its first pod", lambda: seen.jobs("preflight") == SECONDS, timeout=LONG)
        waits = [seen.first_of(job, "preflight") - since for job, since in applied.items()]
        _show(
            f"one run a second, for {SECONDS} s",
            [
                ("p50, apply to first pod, s", f"{statistics.median(waits):.3f}"),
                ("p99, apply to first pod, s", f"{statistics.quantiles(waits, n=100, method='inclusive')[98]:.3f}"),
            ],
        )


def bench_many_at_once(cluster_of_test: Cluster, tmp_path: Path) -> None:
    """JOBS runs with four workers each, applied as fast as the API server accepts them."""
    with (
        _kubelet(cluster_of_test),
        OperatorProcess(cluster_of_test, tmp_path, **SETTINGS) as operator,
        _pod_times(cluster_of_test) as seen,
    ):
        began = time.monotonic()
        _in_parallel(lambda number: cluster_of_test.create(f"run-{number}", workers=WORKERS), range(JOBS))
        applied = time.monotonic() - began
        wait_for("every run has its first pod", lambda: seen.jobs("preflight") == JOBS, timeout=LONG)
        first = max(seen.times("preflight")) - began
        wait_for("every worker pod is there", lambda: seen.pods("train") == JOBS * WORKERS, timeout=LONG)
        all_made = max(seen.times("train")) - began
        _show(
            f"{JOBS} runs of {WORKERS} workers at once",
            [
                ("runs a second, applied", f"{JOBS / applied:.1f}"),
                ("runs a second, to their first pod", f"{JOBS / first:.1f}"),
                ("pods a second, to the last worker", f"{(JOBS * (WORKERS + 1)) / all_made:.1f}"),
                ("p99 of a pass, s", f"<= {_p99_pass(operator):g}"),
                ("operator's memory, MB", f"{_memory(operator):.0f}"),
            ],
        )


def bench_steady_state(cluster_of_test: Cluster, tmp_path: Path) -> None:
    """MANY runs that wait for nodes, among FOREIGN pods; then kill and restart the operator."""
    pod = {"metadata": {"labels": {"app": "foreign"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    _in_parallel(
        lambda number: cluster_of_test.core.create_namespaced_pod(
            cluster_of_test.namespace, {**pod, "metadata": {**pod["metadata"], "name": f"foreign-{number}"}}
        ),
        range(FOREIGN),
    )
    with OperatorProcess(cluster_of_test, tmp_path, **SETTINGS) as operator:
        _in_parallel(lambda number: cluster_of_test.create(f"run-{number}", workers=WORKERS), range(MANY))
        wait_for("every run is known", lambda: operator.metric("internvl_operator_jobs") == MANY, timeout=LONG)
        _quiet(operator)
        grown = _memory(operator)
        writes = operator.metric("internvl_operator_api_writes_total")
        time.sleep(SECONDS)
        written = operator.metric("internvl_operator_api_writes_total") - writes
        operator.kill()
        began = time.monotonic()
        operator.start()
        wait_for(
            "every run was looked at again",
            lambda: (
                operator.metric("internvl_operator_reconcile_seconds_count") >= MANY
                and operator.metric("internvl_operator_queue_depth") == 0
            ),
            timeout=LONG,
        )
        again = time.monotonic() - began
        _quiet(operator)
        _show(
            f"{MANY} runs among {FOREIGN} foreign pods",
            [
                ("operator's memory, MB", f"{grown:.0f}"),
                (f"writes in {SECONDS} s of steady state", f"{written:.0f}"),
                ("from its start to steady state, s", f"{again:.1f}"),
                ("writes after the restart", f"{operator.metric('internvl_operator_api_writes_total'):.0f}"),
                ("operator's memory after the restart, MB", f"{_memory(operator):.0f}"),
            ],
        )


class PodTimes:
    """Records when a watch first saw each pod; the watch starts before the pods."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], float] = {}  # job, stage, pod

    def add(self, pod: Any) -> None:
        meta = pod.metadata
        key = (meta.owner_references[0].name, meta.labels[LABEL_STAGE], meta.name)
        self._seen.setdefault(key, time.monotonic())

    def times(self, stage: str) -> list[float]:
        return [when for (_, of, _), when in list(self._seen.items()) if of == stage]

    def pods(self, stage: str) -> int:
        return len(self.times(stage))

    def first_of(self, job: str, stage: str) -> float:
        return min(when for (name, of, _), when in list(self._seen.items()) if (name, of) == (job, stage))

    def jobs(self, stage: str) -> int:
        return len({name for name, of, _ in list(self._seen) if of == stage})


@contextmanager
def _pod_times(cluster: Cluster) -> Iterator[PodTimes]:
    seen, stream = PodTimes(), watch.Watch()

    def follow() -> None:
        listing = cluster.core.list_namespaced_pod
        with suppress(HTTPError):  # the API server stops before this thread
            for event in stream.stream(listing, cluster.namespace, label_selector=SELECTOR, timeout_seconds=int(LONG)):
                if event["type"] == "ADDED":
                    seen.add(event["object"])

    threading.Thread(target=follow, daemon=True).start()
    yield seen
    stream.stop()


def _kubelet(cluster: Cluster) -> FakeKubelet:
    """Fate of a pod when there are enough nodes: preflight succeeds, workers run."""
    done = Exit(0, json.dumps(result("preflight")))

    def fate(pod: Any) -> Behaviour:
        return done if (pod.metadata.labels or {}).get(LABEL_STAGE) == "preflight" else Run()

    return FakeKubelet(cluster.server.api, behaviour=fate)


def _in_parallel(act: Callable[[int], object], numbers: Iterable[int]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, numbers))


def _quiet(operator: OperatorProcess) -> None:
    """Wait for steady state: no write for QUIET seconds."""

    def still() -> bool:
        before = operator.metric("internvl_operator_api_writes_total")
        time.sleep(QUIET)
        return operator.metric("internvl_operator_api_writes_total") == before

    wait_for("steady state", still, timeout=LONG)


def _p99_pass(operator: OperatorProcess) -> float:
    """Upper bound of the histogram bucket that holds the quantile."""
    total = operator.metric("internvl_operator_reconcile_seconds_count")
    bounds = ("0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "5.0", "10.0", "30.0")
    for bound in bounds:
        if operator.metric("internvl_operator_reconcile_seconds_bucket", le=bound) >= 0.99 * total:
            return float(bound)
    return float("inf")


def _memory(operator: OperatorProcess) -> float:
    """Resident set size in MB."""
    return float(psutil.Process(operator.pid).memory_info().rss / 1e6)


def _show(title: str, rows: list[tuple[str, str]]) -> None:
    cores, memory = psutil.cpu_count(), psutil.virtual_memory().total / 2**30
    table = Table(title=f"{title} ({cores} cores, {memory:.0f} GiB; API server and nodes on the same machine)")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
