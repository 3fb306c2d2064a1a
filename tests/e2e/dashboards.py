"""Asks a real Prometheus every query of the chart's dashboards."""

from __future__ import annotations

import json

from ivft_cluster.helm import CHART
from ivft_cluster.prometheus import Prometheus

# Empty while nothing goes wrong.
PANELS_OF_FAULTS = {
    "Nodes that runs avoid", "Refused writes per second", "Failed passes per second", "Ended attempts in an hour",
}  # fmt: skip


def empty_panels(prometheus: Prometheus, namespace: str, run: str) -> list[str]:
    """Titles of the panels whose query returns nothing for the last second in which the run was training.

    Skips panels that show the workers' own series: Prometheus scrapes them at other times than the operator.
    """
    checkpoint = f'internvl_job_checkpoint_timestamp_seconds{{job_namespace="{namespace}", job_name="{run}"}}'
    (newest,) = prometheus.query(f"max(max_over_time(timestamp({checkpoint})[3h:5s]))")
    last_second = float(newest["value"][1])
    chosen = {"$namespace": namespace, "$run": run}
    empty = []
    for path in sorted((CHART / "files/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            (query,) = [target["expr"] for target in panel["targets"]]
            for variable, value in chosen.items():
                query = query.replace(variable, value)
            if "internvl_train_" not in query and not prometheus.query(query, at=last_second):
                empty.append(panel["title"])
    return empty
