"""config/ for kustomize installs what the chart installs with the same values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.releases import binary
from tools import kustomize_base

CONFIG = CHECKOUT / "config"
Objects = dict[tuple[str, str], Any]


def build(folder: Path) -> Objects:
    """What `kubectl kustomize` prints, by kind and name, without the namespace that Helm makes by itself."""
    command = [str(binary("kubectl")), "kustomize", str(folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: each for key, each in by_name(list(yaml.safe_load_all(text))).items() if key[0] != "Namespace"}


def by_name(objects: list[dict[str, Any]]) -> Objects:
    """The objects by kind and name; variables in any order, because patches change it."""
    for each in objects:
        if each["kind"] == "Deployment":
            for container in each["spec"]["template"]["spec"]["containers"]:
                container["env"].sort(key=lambda variable: variable["name"])
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def chart(values: dict[str, Any]) -> Objects:
    """What the chart renders, without Helm's labels and with the CRD of `crds/`."""
    objects = by_name(kustomize_base.objects(values | kustomize_base.BASE))
    (crd,) = yaml.safe_load_all((CHECKOUT / "crds/internvlfinetunes.yaml").read_text(encoding="utf-8"))
    return objects | by_name([crd])


def test_the_generated_files_are_those_of_the_chart() -> None:
    command = [sys.executable, kustomize_base.__file__, "--check", str(CONFIG)]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_the_base_is_the_charts_default() -> None:
    assert build(CONFIG / "base") == chart({})


def test_the_example_overlay_is_the_chart_with_its_values() -> None:
    values = {
        "global": {"imageRegistry": "registry.example.org"},
        "trainer": {"image": {"tag": "0.1.0-cu13"}},
    }
    assert build(CONFIG / "overlays/example") == chart(values | kustomize_base.MONITORING)


def test_the_openshift_component_names_no_identity(tmp_path: Path) -> None:
    overlay = tmp_path / "kustomization.yaml"
    # kustomize takes relative paths alone
    up = "../" * (len(tmp_path.parts) - 1)
    overlay.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"{up}{CONFIG.relative_to('/')}/base"],
                "components": [f"{up}{CONFIG.relative_to('/')}/components/openshift"],
            }
        )
    )
    assert build(tmp_path) == chart({"podSecurity": None})
