"""The operator's own Prometheus metrics. Durations are seconds."""

from collections.abc import Callable, Iterable, Iterator

from internvl_api.status import EvaluationStatus, InternVLFineTuneStatus
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector

from internvl_operator.core.policies import bad_nodes

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
EVENTS_DROPPED = Counter(f"{_PREFIX}_events_dropped_total", "Kubernetes Events dropped because the queue was full")

Statuses = Iterable[tuple[str, str, InternVLFineTuneStatus]]


class RunCollector(Collector):
    """Gauges of the runs that exist at scrape time, so that none outlives its run."""

    def __init__(self, statuses: Callable[[], Statuses]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family for phases, and one for each number of progress."""
        phases = GaugeMetricFamily(f"{_PREFIX}_jobs", "InternVLFineTunes by phase", labels=["phase"])
        names = ["namespace", "name"]
        step = GaugeMetricFamily("internvl_job_step", "Optimizer steps done", labels=names)
        total = GaugeMetricFamily("internvl_job_total_steps", "Optimizer steps of the run", labels=names)
        loss = GaugeMetricFamily("internvl_job_loss", "Last reported training loss", labels=names)
        attempt = GaugeMetricFamily("internvl_job_attempt", "Current attempt", labels=names)
        avoided = GaugeMetricFamily("internvl_job_avoided_nodes", "Nodes that the run avoids", labels=names)
        evaluation = GaugeMetricFamily(
            "internvl_job_evaluation",
            "Metrics of the base model (model=baseline) and the trained model (model=final)",
            labels=[*names, "model", "task", "metric"],
        )
        counts: dict[str, int] = {}
        for namespace, name, status in self._statuses():
            phase = status.phase or "Pending"
            counts[phase] = counts.get(phase, 0) + 1
            attempt.add_metric([namespace, name], status.attempt)
            avoided.add_metric([namespace, name], len(bad_nodes.avoided(status)))
            if progress := status.progress:
                figures = ((step, progress.step), (total, progress.total_steps), (loss, progress.loss))
                for family, figure in figures:
                    if figure is not None:
                        family.add_metric([namespace, name], figure)
            for labels, value in _figures(status):
                evaluation.add_metric([namespace, name, *labels], value)
        for label, count in sorted(counts.items()):
            phases.add_metric([label], count)
        yield from (phases, step, total, loss, attempt, avoided, evaluation)


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
