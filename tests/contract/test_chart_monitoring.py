"""Alerts and dashboards of the chart: promtool's own unit tests of each alert, and metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract.test_chart import kind
from grafana_foundation_sdk.models.dashboard import Dashboard
from internvl_api.status import InternVLFineTuneStatus
from internvl_operator import metrics
from internvl_trainer.metrics import Reporter
from ivft_cluster import helm
from ivft_cluster.paths import CHECKOUT
from prometheus_client.registry import REGISTRY

DASHBOARDS = sorted((helm.CHART / "files/dashboards").glob("*.json"))
RUN = {"job_namespace": "team", "job_name": "pets"}
RUNNING = 'internvl_job_phase{job_namespace="team", job_name="pets", phase="%s"}'


def alerts() -> list[dict[str, Any]]:
    (rule,) = kind(helm.template({"prometheusRule": {"enabled": True}}), "PrometheusRule")
    return [each for group in rule["spec"]["groups"] for each in group["rules"]]


def exported() -> set[str]:
    """Names of every series that the operator and a trainer export."""
    status = InternVLFineTuneStatus.model_validate(
        {
            "phase": "Running",
            "stage": "train",
            "progress": {"step": 1, "totalSteps": 2, "loss": 0.5},
            "progressAt": "2026-01-31T12:00:00Z",
            "checkpoint": {"step": 1, "uri": "s3://b/c", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"},
            "evaluation": {"final": {"coco": {"CIDEr": 1.0}}},
        }
    )
    reporter = Reporter("team/pets", "train")
    reporter.dataset_losses.set({"coco": 1.0})
    families = [
        *metrics.RunCollector(lambda: [("team", "pets", status)]).collect(),
        *REGISTRY.collect(),
        *reporter.registry.collect(),
    ]
    labelled = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    return labelled | {sample.name for family in families for sample in family.samples}


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:internvl|process)_[a-z_]+\b", re.sub(r'"[^"]*"', "", expression)))


def known(name: str, names: set[str]) -> bool:
    return name in names or name.removesuffix("_bucket") in names


def test_alerts_and_dashboards_use_series_that_exist() -> None:
    names = exported()
    expressions = {each["alert"]: each["expr"] for each in alerts()}
    for path in DASHBOARDS:
        expressions |= {f"{path.name}: {panel['title']}": query for panel, query in queries(path)}
    for where, expression in expressions.items():
        assert names_in(expression), where
        assert {name for name in names_in(expression) if not known(name, names)} == set(), where


def queries(path: Path) -> list[tuple[dict[str, Any], str]]:
    drawn = json.loads(path.read_text(encoding="utf-8"))
    return [(panel, target["expr"]) for panel in drawn["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafana_reads_each_dashboard(path: Path) -> None:
    """Grafana's own types, and panels that do not overlap or leave the grid."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert Dashboard.from_json(content).title == content["title"]
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboards_are_what_the_generator_writes() -> None:
    command = ["operator/dashboards/build.py", "--check", str(helm.CHART / "files/dashboards")]
    subprocess.run([sys.executable, *command], cwd=CHECKOUT, check=True, timeout=60)


def test_config_maps_hold_the_dashboards() -> None:
    maps = [each for each in kind(helm.template({"dashboards": {"enabled": True}}), "ConfigMap") if each.get("data")]
    held = {name: text for each in maps for name, text in each["data"].items()}
    assert held == {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS}
    assert {each["metadata"]["labels"]["grafana_dashboard"] for each in maps} == {"1"}


def test_a_disabled_alert_is_left_out() -> None:
    (rule,) = kind(
        helm.template({"prometheusRule": {"enabled": True, "disabled": ["InternVLRunFailed"]}}), "PrometheusRule"
    )
    left = [each["alert"] for group in rule["spec"]["groups"] for each in group["rules"]]
    assert left == [each["alert"] for each in alerts() if each["alert"] != "InternVLRunFailed"]


def test_an_override_changes_one_alert_and_keeps_the_rest_of_it() -> None:
    change = {"for": "5m", "labels": {"severity": "critical", "team": "vision"}}
    rule_values = {"enabled": True, "overrides": {"InternVLRunStalled": change}}
    (rule,) = kind(helm.template({"prometheusRule": rule_values}), "PrometheusRule")
    found = {each["alert"]: each for group in rule["spec"]["groups"] for each in group["rules"]}
    expected = {each["alert"]: each for each in alerts()}
    expected["InternVLRunStalled"] |= change
    assert found == expected


@pytest.mark.parametrize("values", [{"disabled": ["InternVLRunStaled"]}, {"overrides": {"InternVLRunStaled": {}}}])
def test_an_alert_that_does_not_exist_is_refused_with_those_that_do(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmRenderError, match=r'no alert is named "InternVLRunStaled"; the alerts are InternVL'):
        helm.template({"prometheusRule": {"enabled": True} | values})


def test_every_alert_is_in_the_manual() -> None:
    manual = (CHECKOUT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert [each["alert"] for each in alerts() if f"`{each['alert']}`" not in manual] == []


# Alert -> series that never raise it, series that do, when it is raised, its labels. promtool's notation: `0x9` is ten
# samples of 0, one a minute; `_` is no sample.
CASES: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]], str, dict[str, str]]] = {
    "InternVLRunStalled": (
        [(RUNNING % "Stalled", "1x10 _x50"), (RUNNING % "Running", "_x11 1x50")],
        [(RUNNING % "Stalled", "1x60")],
        "30m",
        RUN | {"phase": "Stalled"},
    ),
    "InternVLRunFailed": ([(RUNNING % "Succeeded", "1x60")], [(RUNNING % "Failed", "1x60")], "5m",
                          RUN | {"phase": "Failed"}),
    "InternVLRunNoProgress": (
        [('internvl_job_progress_timestamp_seconds{job_namespace="team", job_name="pets"}', "0+60x120")],
        [('internvl_job_progress_timestamp_seconds{job_namespace="team", job_name="pets"}', "0x120")],
        "40m", RUN,
    ),
    "InternVLRunRestartStorm": (
        [('internvl_job_restarts{job_namespace="team", job_name="pets", cause="user"}', "3x120")],
        [('internvl_job_restarts{job_namespace="team", job_name="pets", cause="user"}', "0+1x120")],
        "70m", RUN,
    ),
    "InternVLCheckpointOld": (
        [('internvl_job_checkpoint_timestamp_seconds{job_namespace="team", job_name="pets"}', "0+60x300")],
        [('internvl_job_checkpoint_timestamp_seconds{job_namespace="team", job_name="pets"}', "0x300")],
        "260m", RUN,
    ),
    "InternVLOperatorDown": (
        [('internvl_operator_leader{pod="a"}', "1x3 0x60"), ('internvl_operator_leader{pod="b"}', "0x3 1x60")],
        [('internvl_operator_leader{pod="a"}', "0x60"), ('internvl_operator_leader{pod="b"}', "_x60")],
        "10m", {},
    ),
    "InternVLOperatorQueueDeep": (
        [("internvl_operator_queue_depth", "99x60")], [("internvl_operator_queue_depth", "101x60")], "15m", {}
    ),
    "InternVLOperatorPassesFail": (
        [('internvl_operator_reconcile_errors_total{cause="Timeout"}', "5x60")],
        [('internvl_operator_reconcile_errors_total{cause="Timeout"}', "0+1x60")],
        "45m", {"cause": "Timeout"},
    ),
    "InternVLOperatorWatchStale": (
        [('internvl_operator_watch_age_seconds{kind="Pod"}', "299x60")],
        [('internvl_operator_watch_age_seconds{kind="Pod"}', "901x60")],
        "10m", {"kind": "Pod"},
    ),
    "InternVLWebhookCertificateExpires": (
        [("internvl_operator_webhook_certificate_expiry_timestamp_seconds", "0x120"),
         ('internvl_operator_webhook_certificate_expiry_timestamp_seconds{pod="b"}', "2000000x120")],
        [("internvl_operator_webhook_certificate_expiry_timestamp_seconds", "1000000x120")],
        "90m", {},
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert sorted(CASES) == sorted(each["alert"] for each in alerts())


@pytest.mark.integration  # promtool comes with Debian's Prometheus
def test_promtool_raises_each_alert_when_it_should_and_only_then(tmp_path: Path) -> None:
    (rule,) = kind(helm.template({"prometheusRule": {"enabled": True}}), "PrometheusRule")
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rule["spec"]))
    promtool("check", "rules", "alerts.yaml", folder=tmp_path)  # parses the annotations' templates too
    rules = alerts()
    for each in rules:  # promtool compares them letter by letter
        del each["annotations"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    severity = {each["alert"]: each["labels"] for each in rules}
    tests = []
    for name, (quiet, loud, at, labels) in CASES.items():
        for series, expected in ((quiet, []), (loud, [{"exp_labels": labels | severity[name]}])):
            case = {"eval_time": at, "alertname": name, "exp_alerts": expected}
            inputs = [{"series": each, "values": values} for each, values in series]
            tests.append({"interval": "1m", "input_series": inputs, "alert_rule_test": [case]})
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["bare.yaml"], "tests": tests}))
    promtool("test", "rules", "tests.yaml", folder=tmp_path)


def promtool(*arguments: str, folder: Path) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
