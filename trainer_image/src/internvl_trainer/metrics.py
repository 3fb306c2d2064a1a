"""The HTTP endpoints of a running stage: /metrics for Prometheus, /progress and /healthz."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from internvl_api.constants import METRICS_PORT, STARTING
from internvl_api.status import Bandwidth, CheckpointStatus, Heartbeat, Progress, StageName, StepPhase
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from internvl_trainer.http_server import BoundedServer

logger = logging.getLogger(__name__)

_GROUPS = Path("/sys/fs/cgroup")  # of the container
_UNLIMITED = 1 << 62  # bytes; without a limit cgroup v1 reports almost 2^63
MOST_DATASETS = 50
"""Maximum datasets with a loss in Prometheus; metrics.jsonl has all."""
_LONGEST_LABEL = 100  # characters
_STEP_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


def container_memory(groups: Path = _GROUPS) -> int | None:
    """Bytes of the container that cannot be reclaimed, including /dev/shm; None where the kernel does not report them.

    The kernel kills a container when these reach its limit; it drops the page cache first, which is not counted.
    """
    version_1 = groups / "memory/memory.stat"
    file, names = (
        (version_1, ("total_rss", "total_shmem")) if version_1.exists() else (groups / "memory.stat", ("anon", "shmem"))
    )
    try:
        lines = (line.split() for line in file.read_text().splitlines())
        return sum(int(amount) for name, amount in lines if name in names)
    except (OSError, ValueError):
        return None


def free_container_memory(groups: Path = _GROUPS) -> int | None:
    """Bytes until the kernel kills the container; None where it has no limit, or the kernel does not report it."""
    used = container_memory(groups)
    version_1 = groups / "memory/memory.limit_in_bytes"
    try:
        limit = int((version_1 if version_1.exists() else groups / "memory.max").read_text())
    except (OSError, ValueError):  # not reported, or "max"
        return None
    return None if used is None or limit >= _UNLIMITED else limit - used


class DatasetLossGauge:
    """The last loss of each dataset in Prometheus, for the first MOST_DATASETS that are drawn."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._gauge = Gauge(
            "internvl_train_dataset_loss",
            f"Last mean loss of a supervised token of a dataset; of at most {MOST_DATASETS} datasets",
            [*labels, "dataset"],
            registry=registry,
        )
        self._names: dict[str, str] = {}  # the dataset's name -> its label

    def set(self, losses: Mapping[str, float]) -> None:
        """Set the losses of these datasets."""
        for name, loss in losses.items():
            if (label := self._label(name)) is not None:
                self._gauge.labels(**self._labels, dataset=label).set(loss)

    def _label(self, name: str) -> str | None:
        """The dataset's label value, unique and of bounded length; None for datasets over the maximum."""
        if name not in self._names and len(self._names) < MOST_DATASETS:
            short = name if len(name) <= _LONGEST_LABEL else f"{name[:_LONGEST_LABEL]}…{len(self._names)}"
            self._names[name] = short.encode(errors="replace").decode()
        return self._names.get(name)


class BandwidthGauge:
    """Bandwidths in Prometheus, in bytes per second; one that was not measured is absent."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._gauge = Gauge(
            "internvl_train_bandwidth_bytes_per_second",
            "Measured by training: path all-reduce (bus bandwidth over all ranks), storage-write and storage-read (of "
            "the slowest node)",
            [*labels, "path"],
            registry=registry,
        )

    def set(self, found: Bandwidth) -> None:
        """Set those that were measured."""
        for name, rate in found.model_dump(exclude_none=True).items():
            self._gauge.labels(**self._labels, path=name.replace("_", "-")).set(rate)


class Reporter:
    """The metrics and progress of one process. Rank 0 reports the run's; other ranks their data wait and step time."""

    def __init__(self, job: str, stage: StageName) -> None:
        self.registry = CollectorRegistry()
        self.progress = Progress(stage=stage, detail=STARTING)
        self._activity = STARTING  # what `detail` says again after a download
        self.checkpoint: CheckpointStatus | None = None
        self._phase: tuple[StepPhase, float] | None = None  # and since when
        self._peak_memory = 0  # bytes
        self._server: BoundedServer | None = None
        namespace, _, name = job.rpartition("/")
        labels = {"job_namespace": namespace, "job_name": name}

        def gauge(metric: str, text: str) -> Gauge:
            return Gauge(metric, text, list(labels), registry=self.registry).labels(**labels)

        def counter(metric: str, text: str) -> Counter:
            return Counter(metric, text, list(labels), registry=self.registry).labels(**labels)

        self.loss = gauge("internvl_train_loss", "(Weighted) mean loss of a supervised token in the last step")
        self.dataset_losses = DatasetLossGauge(self.registry, labels)
        self.bandwidth = BandwidthGauge(self.registry, labels)
        self.validation_loss = gauge(
            "internvl_train_validation_loss", "Mean loss of a supervised token of data.validation, as last taken"
        )
        self.learning_rate = gauge("internvl_train_learning_rate", "Learning rate of the last step")
        self.gradient_norm = gauge("internvl_train_gradient_norm", "Norm of all gradients before clipping")
        self.step = gauge("internvl_train_step", "Optimizer steps taken, over all attempts")
        self.total_steps = gauge("internvl_train_total_steps", "Optimizer steps of the whole run")
        self.samples_per_second = gauge("internvl_train_samples_per_second", "Over all ranks, in the last step")
        self.tokens_per_second = gauge("internvl_train_tokens_per_second", "Real tokens, over all ranks")
        self.packing_efficiency = gauge(
            "internvl_train_packing_efficiency",
            "Real tokens over all positions computed, padding too, in the last step",
        )
        self.samples = counter("internvl_train_samples", "Samples learned from by this attempt")
        self.data_wait = counter("internvl_train_data_wait_seconds", "Time in which steps waited for data")
        self.checkpoint_seconds = gauge(
            "internvl_train_checkpoint_seconds", "Time from the step of the last checkpoint until it was complete"
        )
        self.checkpoint_stall_seconds = gauge(
            "internvl_train_checkpoint_stall_seconds", "Time that training stood still for the last checkpoint"
        )
        self.checkpoint_upload_seconds = gauge(
            "internvl_train_checkpoint_upload_seconds", "Time in which rank 0 stored its share of the last checkpoint"
        )
        self.checkpoint_bytes = gauge("internvl_train_checkpoint_bytes", "Size of the last checkpoint")
        self.checkpoint_step = gauge("internvl_train_checkpoint_step", "Step of the newest verified checkpoint")
        self.skipped_rows = gauge("internvl_data_skipped_rows", "Bad rows left out (data.badRows: skip)")
        self.dropped_connections = gauge(
            "internvl_http_dropped_connections", "Connections to this server that were too many, too slow or cut off"
        )
        self.gpu_memory_peak = gauge(
            "internvl_gpu_memory_peak_bytes", "Most memory that torch reserved on this process's GPU"
        )
        self.host_memory_peak = gauge(
            "internvl_host_memory_peak_bytes", "Most memory that the container used at a report, without page cache"
        )
        self.step_seconds = Histogram(
            "internvl_train_step_seconds", "Time of a step", list(labels), registry=self.registry, buckets=_STEP_BUCKETS
        ).labels(**labels)

    def doing(self, detail: str) -> None:
        """Set and log what the stage is doing."""
        self.update(detail=detail)
        logger.info("%s: %s", self.progress.stage, detail)

    def update(self, **fields: Any) -> None:
        """Set fields of /progress."""
        self._activity = fields.get("detail", self._activity)
        self.progress = self.progress.model_copy(update=fields)

    def downloading(self, text: str | None) -> None:
        """Show the progress of a download as what the stage is doing; None, at its end: what it was doing before."""
        self.progress = self.progress.model_copy(update={"detail": text or self._activity})

    def note_memory(self, gpu: int | None) -> None:
        """Note the peaks of memory so far; `gpu`: bytes that torch reserved at most, None on the CPU."""
        host = self._memory().get("peakMemoryBytes")
        if gpu is not None:
            self.gpu_memory_peak.set(gpu)
        self.update(peak_gpu_memory_bytes=gpu, peak_memory_bytes=host)

    def _memory(self) -> dict[str, int]:
        used = container_memory()
        if used is None:
            return {}
        self._peak_memory = max(self._peak_memory, used)
        self.host_memory_peak.set(self._peak_memory)
        return {"peakMemoryBytes": self._peak_memory}

    def enter(self, phase: StepPhase) -> None:
        """Note that this process begins the next part of a step."""
        self._phase = phase, time.monotonic()

    def serve(self, local_rank: int = 0) -> None:
        """Answer HTTP in the background; with a warning and no server when the port is taken."""
        port = int(os.environ.get("INTERNVL_METRICS_PORT", METRICS_PORT)) + local_rank
        reporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = reporter.answer(self.path)
                self.send_response(200 if answer else 404)
                content_type, body = answer or ("text/plain", b"try /metrics, /progress or /healthz\n")
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Do not log requests."""

        try:
            self._server = BoundedServer(port, Handler)
        except OSError as error:
            logger.warning("no metrics: port %d cannot be used (%s); set INTERNVL_METRICS_PORT", port, error.strerror)
            return
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """Content type and body of a GET, or None for an unknown path."""
        match path.partition("?")[0]:
            case "/metrics":
                self.dropped_connections.set(self._server.dropped if self._server else 0)
                self._memory()
                return CONTENT_TYPE_LATEST, generate_latest(self.registry)
            case "/progress":
                body = self.progress.to_dict() | self._memory()
                body["checkpoint"] = self.checkpoint.to_dict() if self.checkpoint else None
                if self._phase:
                    phase, since = self._phase
                    body["heartbeat"] = Heartbeat(phase=phase, idle_seconds=time.monotonic() - since).to_dict()
                return "application/json", json.dumps(body).encode()
            case "/healthz":
                return "text/plain", b"ok\n"
        return None
