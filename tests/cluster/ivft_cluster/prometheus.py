"""Debian's Prometheus: scrapes every pod with the usual annotations every two seconds."""

from __future__ import annotations

import signal
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from ivft_cluster import daemons
from ivft_cluster.shell import tail, wait_for

SCRAPE_SECONDS = 2


@dataclass(frozen=True)
class Prometheus:
    """Listens on `address`:`port`; `url` is where this process reaches it."""

    member: str
    state: Path
    address: str
    port: int
    url: str
    netns: tuple[str, ...] = ()

    @property
    def targets(self) -> Path:
        """The file to which `discovery` writes the pods."""
        return self.state / "targets.json"

    @property
    def _rules(self) -> Path:
        return self.state / "rules.yaml"

    def start(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        config = self.state / "prometheus.yaml"
        config.write_text(yaml.safe_dump(scrape_config(self.targets, self._rules), sort_keys=False))
        daemons.start(
            self.member,
            [
                *self.netns,
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={self.state / 'data'}",
                f"--web.listen-address={self.address}:{self.port}",
                "--log.level=warn",
            ],
            self.state / "prometheus.log",
        )

    def wait_ready(self) -> None:
        def ready() -> bool:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)

        wait_for("Prometheus is ready", ready, on_timeout=lambda: tail(self.state / "prometheus.log"))

    def load_rules(self, groups: list[dict[str, Any]]) -> None:
        """Replace the alerting rules; returns when Prometheus evaluates them.

        Raises HarnessError with the end of Prometheus's log when it does not accept them.
        """
        self._rules.write_text(yaml.safe_dump({"groups": groups}, sort_keys=False))
        for process in daemons.find(self.member):
            process.send_signal(signal.SIGHUP)
        wanted = {group["name"] for group in groups}

        def loaded() -> bool:
            return {group["name"] for group in self._ask("rules")["groups"]} == wanted

        wait_for("Prometheus has loaded the rules", loaded, on_timeout=lambda: tail(self.state / "prometheus.log"))

    def firing(self) -> list[dict[str, str]]:
        """The labels of every alert that fires."""
        return [each["labels"] for each in self._ask("alerts")["alerts"] if each["state"] == "firing"]

    def _ask(self, what: str, **parameters: str) -> dict[str, Any]:
        answer = requests.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=10)
        if not answer.ok:
            raise requests.HTTPError(answer.text, response=answer)
        return dict(answer.json()["data"])

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The answer at a Unix time, or now: `[{"metric": {label: value}, "value": [time, "number"]}, …]`.

        Raises requests.HTTPError with Prometheus's own message for a wrong expression.
        """
        moment = {} if at is None else {"time": str(at)}
        return list(self._ask("query", query=expression, **moment)["result"])


def scrape_config(targets: Path, rules: Path) -> dict[str, Any]:
    """Keep pods annotated prometheus.io/scrape=true; labels: namespace, pod, `internvl_dev_*` for `internvl.dev/*`."""
    annotation = "__meta_kubernetes_pod_annotation_prometheus_io_"
    relabel: list[dict[str, Any]] = [
        {"source_labels": [f"{annotation}scrape"], "action": "keep", "regex": "true"},
        # a pod that has ended keeps its address in the API for a while
        {"source_labels": ["__meta_kubernetes_pod_phase"], "action": "drop", "regex": "Succeeded|Failed"},
        {
            "source_labels": ["__meta_kubernetes_pod_ip", f"{annotation}port"],
            "separator": ":",
            "regex": "(.+:.+)",
            "target_label": "__address__",
        },
        {"source_labels": [f"{annotation}path"], "regex": "(.+)", "target_label": "__metrics_path__"},
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
        {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
        {"action": "labelmap", "regex": "__meta_kubernetes_pod_label_(internvl_dev_.+)"},
    ]
    return {
        "global": {
            "scrape_interval": f"{SCRAPE_SECONDS}s",
            "scrape_timeout": f"{SCRAPE_SECONDS}s",
            "evaluation_interval": f"{SCRAPE_SECONDS}s",
        },
        "rule_files": [f"{rules}*"],  # a pattern may match nothing
        "scrape_configs": [
            {
                "job_name": "pods",
                "file_sd_configs": [{"files": [str(targets)]}],
                "relabel_configs": relabel,
            }
        ],
    }
