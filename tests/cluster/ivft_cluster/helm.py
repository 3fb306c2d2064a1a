"""Real Helm, as a library: render, check, install, upgrade and remove the project's chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import yaml
from helm_python import HelmReleaseError, HelmRenderError, HelmValuesError

from ivft_cluster.paths import CHECKOUT

__all__ = [
    "CHART",
    "HelmReleaseError",
    "HelmRenderError",
    "HelmValuesError",
    "install",
    "lint",
    "rollback",
    "template",
    "uninstall",
    "upgrade",
]

CHART = CHECKOUT / "charts/internvl-operator"
RELEASE, NAMESPACE = "internvl-operator", "internvl-system"

Values = dict[str, Any]


def template(
    values: Values | None = None, *, release: str = RELEASE, namespace: str = NAMESPACE
) -> list[dict[str, Any]]:
    """`helm template`: every object but the hooks, in no particular order.

    Raises HelmValuesError naming the key that the chart's schema refuses, HelmRenderError for a template's own check.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        files = chart.render(values, name=release, namespace=namespace)
    return [document for document in _documents(files) if not _is_hook(document)]


def hooks(values: Values | None = None) -> list[dict[str, Any]]:
    """The hooks of the chart, such as the pod of `helm test`."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    return [document for document in _documents(files) if _is_hook(document)]


def _documents(files: dict[str, str]) -> list[dict[str, Any]]:
    manifests = [text for path, text in files.items() if not path.endswith("NOTES.txt")]
    return [document for text in manifests for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def _is_hook(document: dict[str, Any]) -> bool:
    return "helm.sh/hook" in (document["metadata"].get("annotations") or {})


def lint(values: Values | None = None) -> list[str]:
    """Warnings and errors of `helm lint --strict`."""
    report = helm_python.lint(CHART, values, strict=True)
    return [f"{each['path']}: {each['error']}" for each in report["messages"] if each["severity"] > 1]


def install(
    kubeconfig: Path,
    values: Values | None = None,
    *,
    chart: Path = CHART,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    wait: bool = True,
    timeout: int = 120,
) -> dict[str, Any]:
    """`helm install --create-namespace`; with `wait`, returns when the operator is ready. Raises HelmReleaseError."""
    options = _options(namespace, wait, timeout)
    with _connect(kubeconfig, namespace) as helm:
        return helm.install(chart, release, values, create_namespace=True, **options)


def upgrade(
    kubeconfig: Path,
    values: Values | None = None,
    *,
    chart: Path = CHART,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    wait: bool = True,
    timeout: int = 120,
) -> dict[str, Any]:
    """`helm upgrade` with exactly these values. Raises HelmNotFoundError, HelmReleaseError."""
    options = _options(namespace, wait, timeout)
    with _connect(kubeconfig, namespace) as helm:
        return helm.upgrade(chart, release, values, **options)


def revision(kubeconfig: Path, *, release: str = RELEASE, namespace: str = NAMESPACE) -> int:
    """The release's newest revision."""
    with _connect(kubeconfig, namespace) as helm:
        return int(helm.history(release)[-1]["revision"])


def rollback(
    kubeconfig: Path,
    revision: int,
    *,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    wait: bool = True,
    timeout: int = 120,
) -> None:
    """`helm rollback` to a revision. Raises HelmReleaseError."""
    with _connect(kubeconfig, namespace) as helm:
        helm.rollback(release, version=revision, wait="watcher" if wait else None, timeout=timeout)


def run_tests(kubeconfig: Path, *, release: str = RELEASE, namespace: str = NAMESPACE, timeout: int = 600) -> str:
    """`helm test --logs`; the logs of its pods. Raises HelmReleaseError when one fails."""
    with _connect(kubeconfig, namespace) as helm:
        return str(helm.test(release, timeout=timeout, logs=True)["logs"])


def uninstall(kubeconfig: Path, *, release: str = RELEASE, namespace: str = NAMESPACE, timeout: int = 120) -> None:
    """`helm uninstall --ignore-not-found --wait`; the CRD stays (crds.keep)."""
    with _connect(kubeconfig, namespace) as helm:
        helm.uninstall(release, ignore_not_found=True, wait="watcher", timeout=timeout)


def _connect(kubeconfig: Path, namespace: str) -> helm_python.Config:
    return helm_python.Config(kubeconfig_path=kubeconfig, namespace=namespace)


def _options(namespace: str, wait: bool, timeout: int) -> dict[str, Any]:
    return {"namespace": namespace, "wait": "watcher" if wait else None, "timeout": timeout}
