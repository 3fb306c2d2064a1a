"""Render the chart for kustomize: its defaults into config/base, what monitoring adds into its component.

Usage: kustomize_base.py [--check] config
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from internvl_api.generated import generate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
from ivft_cluster import helm

HEAD = "# Generated from the chart by `make generate`; change the chart.\n"
BASE = {"crds": {"install": False}}
MONITORING = {
    "metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
    "prometheusRule": {"enabled": True},
    "dashboards": {"enabled": True},
}


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The chart's objects without Helm's labels, sorted by kind and name."""
    found = [_without_helm(each) for each in helm.template(values)]
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def _without_helm(node: Any) -> Any:
    """The object without `helm.sh/*`, managed by kustomize."""
    if isinstance(node, list):
        return [_without_helm(each) for each in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _without_helm(value) for key, value in node.items() if not str(key).startswith("helm.sh/")}
    if "app.kubernetes.io/managed-by" in kept:
        kept["app.kubernetes.io/managed-by"] = "kustomize"
    return kept


def files(config: Path) -> dict[Path, str]:
    """The text of each generated file below `config`."""
    base = objects(BASE)
    names = {(each["kind"], each["metadata"]["name"]) for each in base}
    added = [each for each in objects(BASE | MONITORING) if (each["kind"], each["metadata"]["name"]) not in names]
    return {
        config / "base/operator.yaml": _text(base),
        config / "components/monitoring/monitoring.yaml": _text(added),
    }


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _plain(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _plain)


def _text(documents: list[dict[str, Any]]) -> str:
    return HEAD + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=True, width=120)


if __name__ == "__main__":
    sys.exit(generate(__doc__, files))
