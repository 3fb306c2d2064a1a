"""The operator's own Prometheus metrics. Durations are seconds."""

from collections.abc import Callable, Iterable, Iterator

from internvl_api.status import EvaluationStatus, InternVLFineTuneStatus
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector

from internvl_operator.core.policies import bad_nodes
from internvl_operator.core.timestamps import from_text

_PREFIX = "internvl_operator"

RECONCILE_SECONDS = Histogram(
    f"{_PREFIX}_reconcile_seconds",
    "Duration of one pass over a run, with its writes",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
RECONCILE_ERRORS = Counter(f"{_PREFIX}_reconcile_errors_total", "Failed passes; each is retried", ["cause"])
API_WRITES = Counter(f"{_PREFIX}_api_writes_total", "Write requests to the API server", ["verb", "kind", "result"])
RESTARTS = Counter(f"{_PREFIX}_restarts_total", "Attempts that ended before their stage succeeded", ["cause"])
FIRST_POD_SECONDS = Histogram(
    f"{_PREFIX}_first_pod_seconds",
    "From a run's creation (whole seconds, the API server's clock) to its first pod object",
    buckets=(0.25, 0.5, 1, 2, 5, 10, 30, 60),
)
WATCH_AGE = Gauge(f"{_PREFIX}_watch_age_seconds", "Seconds since the API server last answered a watch", ["kind"])
QUEUE_DEPTH = Gauge(f"{_PREFIX}_queue_depth", "Runs waiting for their pass")
LEADER = Gauge(f"{_PREFIX}_leader", "1 while this replica is active, 0 while it stands by")
LOOP_LAG = Gauge(f"{_PREFIX}_event_loop_lag_seconds", "Delay of the event loop at its last check")
CERTIFICATE_EXPIRY = Gauge(
    f"{_PREFIX}_webhook_certificate_expiry_timestamp_seconds", "When the served certificate of the webhook expires"
)
RESYNC_MISSED = Counter(
    f"{_PREFIX}_resync_missed_total", "Changes that a relist found and the watch had missed", ["kind"]
)
NOTICES = Counter(
    f"{_PREFIX}_notices_total", "Deliveries of notices to webhooks: sent, failed, given up, dropped", ["result"]
)
EVENTS_DROPPED = Counter(f"{_PREFIX}_events_dropped_total", "Kubernetes Events dropped because the queue was full")

Statuses = Iterable[tuple[str, str, InternVLFineTuneStatus]]


_PER_RUN = {
    "phase": "1 for the run's phase",
    "step": "Optimizer steps done",
    "total_steps": "Optimizer steps of the run",
    "loss": "Last reported training loss",
    "attempt": "Current attempt",
    "restarts": "Attempts that ended before their stage succeeded, by cause",
    "avoided_nodes": "Nodes that the run avoids",
    "missing_workers": "Workers that the spec asks for and the cluster has no room for",
    "progress_timestamp_seconds": "When the current attempt of a running run last made progress",
    "checkpoint_timestamp_seconds": "When the newest checkpoint of a run that trains was verified",
    "gpu_hours": "GPUs times hours of the attempts that have ended",
    "cost": "GPU-hours of the attempts that have ended, times the administrator's price",
    "evaluation": "Metrics of the base model (model=baseline) and the trained model (model=final)",
}
# Not `namespace`: Prometheus sets that to the namespace of the pod that it reads, here the operator's.
_LABELS = ("job_namespace", "job_name")
_MORE_LABELS = {
    "phase": ["phase"],
    "restarts": ["cause"],
    "evaluation": ["model", "task", "metric"],
    "cost": ["currency"],
}

Sample = tuple[str, tuple[str, ...], float]  # name without prefix, values of _MORE_LABELS, value


class RunCollector(Collector):
    """Gauges of the runs that exist at scrape time, so that none outlives its run."""

    def __init__(self, statuses: Callable[[], Statuses]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The number of runs in each phase, then the families of _PER_RUN."""
        phases = GaugeMetricFamily(f"{_PREFIX}_jobs", "InternVLFineTunes by phase", labels=["phase"])
        families = {
            name: GaugeMetricFamily(f"internvl_job_{name}", text, labels=[*_LABELS, *_MORE_LABELS.get(name, [])])
            for name, text in _PER_RUN.items()
        }
        counts: dict[str, int] = {}
        for namespace, name, status in self._statuses():
            phase = status.phase or "Pending"
            counts[phase] = counts.get(phase, 0) + 1
            for family, labels, value in _samples(status):
                families[family].add_metric([namespace, name, *labels], value)
        for label, count in sorted(counts.items()):
            phases.add_metric([label], count)
        yield from (phases, *families.values())


def _samples(status: InternVLFineTuneStatus) -> Iterator[Sample]:
    yield "phase", (status.phase or "Pending",), 1
    yield "attempt", (), status.attempt
    yield "restarts", ("user",), status.restarts.user
    yield "restarts", ("infrastructure",), status.restarts.infrastructure
    yield "avoided_nodes", (), len(bad_nodes.avoided(status))
    yield "missing_workers", (), status.elastic.wanted - status.elastic.workers if status.elastic else 0
    if usage := status.usage:
        yield "gpu_hours", (), usage.gpu_hours
        if usage.cost is not None:
            yield "cost", (usage.currency or "",), usage.cost
    if progress := status.progress:
        figures = (("step", progress.step), ("total_steps", progress.total_steps), ("loss", progress.loss))
        yield from ((name, (), figure) for name, figure in figures if figure is not None)
    if status.phase == "Running":
        yield from _times(status)
    for labels, value in _figures(status):
        yield "evaluation", labels, value


def _times(status: InternVLFineTuneStatus) -> Iterator[Sample]:
    """Unix times, only of running runs: alerts compare them with now."""
    if progress_at := from_text(status.progress_at):
        yield "progress_timestamp_seconds", (), progress_at.timestamp()
    checkpoint = status.checkpoint if status.stage == "train" else None
    if checkpoint and (verified_at := from_text(checkpoint.verified_at)):
        yield "checkpoint_timestamp_seconds", (), verified_at.timestamp()


def _figures(status: InternVLFineTuneStatus) -> Iterator[tuple[tuple[str, str, str], float]]:
    measured = status.evaluation or EvaluationStatus()
    for model, tasks in (("baseline", measured.baseline), ("final", measured.final)):
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                yield (model, task, metric), value


def publish_runs(statuses: Callable[[], Statuses]) -> RunCollector:
    """Register the collector of per-run gauges."""
    collector = RunCollector(statuses)
    REGISTRY.register(collector)
    return collector
