"""The steps of a new user on a real cluster, from installing to uninstalling; docs/install.md lists their times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml
from e2e.dashboards import PANELS_OF_FAULTS, empty_panels
from e2e.harness import Platform, assert_same_losses, stalled, trains
from ivft_cluster import helm
from ivft_cluster.shell import wait_for
from ivft_demo.data import BUCKET, SECRET, write_secret
from ivft_demo.install import Images, image_values, install_operator
from ivft_demo.results import losses, verify_manifest

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

DEFAULTS = """
outputPrefix: s3://demo/runs
secrets: {objectStorage: s3-credentials}
podTemplate:
  resources: {requests: {cpu: 500m, memory: 1Gi}}
  env: [{name: OMP_NUM_THREADS, value: "1"}]
"""
RUN = """
apiVersion: internvl.dev/v1alpha1
kind: InternVLFineTune
metadata: {name: pets}
spec:
  model: {source: s3://demo/models/tiny-internvl2}
  method: lora
  data: {train: {pets: {annotation: s3://demo/data/train.jsonl, root: s3://demo/data/}}}
  workers: 2
  training: {maxSteps: 300, epochs: 90, globalBatchSize: 8, precision: fp32}
  checkpoint: {everySteps: 50}
"""
ALERT = "InternVLRunStalled"


class Times:
    """Measures how many seconds each step takes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[step] = time.monotonic() - start

    def table(self) -> str:
        lines = [f"{step:<66} {seconds:6.1f} s" for step, seconds in self._seconds.items()]
        return "\n".join([*lines, f"{'together':<66} {sum(self._seconds.values()):6.1f} s"])


@pytest.fixture
def times(capsys: pytest.CaptureFixture[str]) -> Iterator[Times]:
    """Prints its table after the test."""
    times = Times()
    yield times
    with capsys.disabled():
        print(f"\n{times.table()}")


@pytest.fixture
def team(platform: Platform, images: Images) -> Iterator[Platform]:
    """A namespace with its Secret on a cluster without the product; other tests get their release back afterwards."""
    platform.delete_all()
    helm.uninstall(platform.cluster.kubeconfig)
    try:
        with platform.cluster.namespace("team") as namespace:
            write_secret(platform.cluster, namespace)
            yield Platform(platform.cluster, namespace)
    finally:
        helm.uninstall(platform.cluster.kubeconfig)
        install_operator(platform.cluster, images, retryCapSeconds=5)


def apply(team: Platform, name: str, **spec: object) -> str:
    """Apply the run under this name with kubectl; return its output, which the namespace's defaults set."""
    resource = yaml.safe_load(RUN)
    resource["metadata"]["name"] = name
    resource["spec"] |= spec
    team.cluster.kubectl("apply", "-n", team.namespace, "-f", "-", input=yaml.safe_dump(resource))
    return f"s3://{BUCKET}/runs/{team.namespace}/{name}"


def set_defaults(team: Platform) -> None:
    body = {"metadata": {"name": "internvl-defaults"}, "data": {"defaults.yaml": DEFAULTS}}
    team.core.create_namespaced_config_map(team.namespace, body)


def load_alerts(team: Platform, values: helm.Values) -> None:
    """Load the chart's alerts into Prometheus; the alert on a stalled run fires after 5 seconds, not 15 minutes."""
    rules = {"enabled": True, "overrides": {ALERT: {"for": "5s"}}}
    rendered = helm.template(values | {"prometheusRule": rules})
    (rule,) = [each for each in rendered if each["kind"] == "PrometheusRule"]
    team.cluster.prometheus.load_rules(rule["spec"]["groups"])


def alert_fires(team: Platform, run: str) -> bool:
    wanted = {"alertname": ALERT, "job_namespace": team.namespace, "job_name": run}
    return any(wanted.items() <= labels.items() for labels in team.cluster.prometheus.firing())


def test_from_helm_install_to_uninstall(team: Platform, images: Images, times: Times) -> None:
    assert len(RUN.strip().splitlines()) == 10
    kubeconfig = team.cluster.kubeconfig
    values = {"image": image_values(images.operator.name), "trainer": {"image": image_values(images.trainer.name)}}
    with times.of("helm install, with no value but the images"):
        helm.install(kubeconfig, values)
    with times.of("helm test"):
        assert "ok: the operator takes in a run" in helm.run_tests(kubeconfig)

    with times.of("a run of ten lines is published (300 steps, two workers)"):
        set_defaults(team)
        first = apply(team, "pets")
        team.follow("pets")
    assert "adapter/adapter_model.safetensors" in {each.path for each in verify_manifest(team.s3, f"{first}/artifacts")}
    with times.of("Prometheus answers the queries of every dashboard"):
        assert set(empty_panels(team.cluster.prometheus, team.namespace, "pets")) <= PANELS_OF_FAULTS

    load_alerts(team, values)
    with times.of("the Secret of a run is missing: the run stalls, its alert fires"):
        apply(team, "late", secrets={"objectStorage": "late-keys"})
        team.wait("late", "stalled", lambda status: stalled(status) == "SecretMissing")
        wait_for(f"{ALERT} fires", lambda: alert_fires(team, "late"))
    with times.of("the Secret is created: the run continues and the alert resolves"):
        keys = team.core.read_namespaced_secret(SECRET, team.namespace).data
        team.core.create_namespaced_secret(team.namespace, {"metadata": {"name": "late-keys"}, "data": keys})
        team.wait("late", "running", lambda status: status.phase == "Running")
        wait_for(f"{ALERT} resolves", lambda: not alert_fires(team, "late"))
    team.delete("late")

    with times.of("helm upgrade and rollback during training, until it is published"):
        second = apply(team, "again")
        team.wait("again", "training", trains)
        before = helm.revision(kubeconfig)
        helm.upgrade(kubeconfig, values | {"settings": {"workerThreads": 3}})
        helm.rollback(kubeconfig, before)
        status = team.follow("again")
    assert (status.attempt, status.restarts.user, status.restarts.infrastructure) == (1, 0, 0)
    assert_same_losses(losses(team.s3, second), losses(team.s3, first))

    published = [verify_manifest(team.s3, f"{output}/artifacts") for output in (first, second)]
    with times.of("helm uninstall"):
        helm.uninstall(kubeconfig)
    left = team.cluster.kubectl("get", "internvlfinetunes", "-n", team.namespace, "-o", "name").split()
    assert left == ["internvlfinetune.internvl.dev/again", "internvlfinetune.internvl.dev/pets"]
    assert [verify_manifest(team.s3, f"{output}/artifacts") for output in (first, second)] == published
