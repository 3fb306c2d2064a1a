"""What a GitOps tool does to runs, on a real API server: apply again, compare, prune, rename, drop a namespace."""

import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller.builders import Raw, spec
from controller.faulty_proxy import FaultyProxy
from controller.operator_process import SELECTOR, Cluster, OperatorProcess
from controller.story import Story
from internvl_api.constants import API_VERSION, GROUP, KIND, PLURAL, VERSION
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.releases import binary
from ivft_cluster.shell import HarnessError, wait_for
from ivft_cluster.shell import run as command
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration

EXAMPLES = [*sorted((CHECKOUT / "examples").glob("*.yaml")), CHECKOUT / "examples/gitops/run.yaml"]
Mode = tuple[str, ...]
# Flux; Argo CD when it is told to
SERVER_SIDE: Mode = ("--server-side", "--force-conflicts", "--field-manager=kustomize-controller")
CLIENT_SIDE: Mode = ()  # kubectl and Argo CD, unless they are told otherwise
MODES = [pytest.param(SERVER_SIDE, id="server-side"), pytest.param(CLIENT_SIDE, id="client-side")]


class Kubectl:
    """kubectl in one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._start = [binary("kubectl"), "--kubeconfig", cluster.server.kubeconfig, "-n", cluster.namespace]

    def __call__(self, *words: str | Path) -> str:
        return command([*self._start, *words])

    def apply(self, mode: Mode, *files: Path) -> str:
        return self("apply", *mode, *(word for file in files for word in ("-f", file)))

    def assert_no_difference(self, mode: Mode, *files: Path) -> None:
        """By `kubectl diff`, which a tool's own comparison is like."""
        words = [*self._start, "diff", *mode, *(word for file in files for word in ("-f", file))]
        found = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr

    def assert_applied_for_good(self, mode: Mode, *files: Path) -> None:
        """What is there, whoever has written to it, is what the files say: applying them again changes nothing."""
        before = self._versions()
        self.assert_no_difference(mode, *files)
        self.apply(mode, *files)
        assert self._versions() == before

    def _versions(self) -> dict[str, tuple[int, str]]:
        cluster = self._cluster
        found = cluster.runs.list_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURAL)["items"]
        metadata = [raw["metadata"] for raw in found]
        return {each["name"]: (each["generation"], each["resourceVersion"]) for each in metadata}


@pytest.fixture
def kubectl(cluster_of_test: Cluster) -> Kubectl:
    return Kubectl(cluster_of_test)


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run as a file of a git repository; `changes` go to its spec."""

    def write(name: str = "run", metadata: Raw | None = None, **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        raw = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name} | (metadata or {})}
        path.write_text(yaml.safe_dump(raw | {"spec": spec(**changes)}))
        return path

    return write


# --- the same again


@pytest.mark.parametrize("mode", MODES)
def test_an_example_applied_again_changes_nothing(mode: Mode, kubectl: Kubectl) -> None:
    made = kubectl.apply(mode, *EXAMPLES).splitlines()
    assert len({line.split()[0] for line in made}) == len(EXAMPLES)
    kubectl.apply(mode, *EXAMPLES)  # no operator has written the status: a server-side apply stores its default
    kubectl.assert_applied_for_good(mode, *EXAMPLES)


def test_the_overlay_is_taken_by_the_server(served: ApiServer) -> None:
    kubectl = [binary("kubectl"), "--kubeconfig", served.kubeconfig]
    team = {"metadata": {"name": "team-a"}}
    served.core.create_namespace(team)
    try:
        folder = CHECKOUT / "examples/gitops"
        said = command([*kubectl, "apply", "--server-side", "--dry-run=server", "-k", folder])
    finally:
        served.core.delete_namespace("team-a")
    assert said.split() == [
        "internvlfinetune.internvl.dev/support-answers",
        "serverside-applied",
        "(server",
        "dry",
        "run)",
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {
                "podTemplate": {
                    "resources": {
                        "requests": {"cpu": "1000m", "memory": "1024Mi", "ephemeral-storage": "1e9"},
                        "limits": {"cpu": 2, "memory": "1.5Gi"},
                    },
                    "shmSize": "1024Mi",
                }
            },
            id="quantities of every spelling",
        ),
        pytest.param({"training": {"epochs": 1.0, "learningRate": 0.00004, "adamBetas": [0, 0.95]}}, id="numbers"),
        pytest.param(
            {"podTemplate": {"env": [{"name": "A", "value": "1"}, {"name": "B"}, {"name": "A", "value": "2"}]}},
            id="a variable twice",
        ),
        pytest.param(
            {
                "podTemplate": {"env": [], "labels": {}, "nodeSelector": {}, "tolerations": [], "volumes": []},
                "lora": {},
                "merge": {"formats": []},
                "training": {"deepspeed": {}},
            },
            id="nothing, said in words",
        ),
        pytest.param(
            {"training": {"deepspeed": {"steps_per_print": 10, "zero_optimization": {"reduce_bucket_size": 1e8}}}},
            id="names that are not ours",
        ),
        pytest.param(
            {"runPolicy": {"suspend": False, "backoffLimit": 3}, "gpusPerWorker": 0, "scheduling": {}},
            id="defaults, said in words",
        ),
        pytest.param({"output": "s3://out/run/"}, id="a slash at the end"),
    ],
)
def test_a_run_that_goes_on_is_what_git_says(
    mode: Mode, changes: Raw, run: Story, operator: OperatorProcess, kubectl: Kubectl, manifest: Callable[..., Path]
) -> None:
    file = manifest(**changes)
    kubectl.apply(mode, file)
    run.to_training()
    kubectl.assert_applied_for_good(mode, file)
    run.to_the_end()
    kubectl.assert_applied_for_good(mode, file)
    assert run.cluster.get()["metadata"]["generation"] == 1


@pytest.mark.parametrize("field", ["recipe", "evaluation", "runPolicy.activeDeadlineSeconds", "podTemplate.affinity"])
def test_a_field_left_empty_is_refused_by_name_or_left_out(
    field: str, cluster_of_test: Cluster, kubectl: Kubectl, manifest: Callable[..., Path]
) -> None:
    """`field:` with nothing behind it is null. A client-side apply leaves it out; a server-side one sends it."""
    *section, last = field.split(".")
    file = manifest(**({section[0]: {last: None}} if section else {last: None}))
    with pytest.raises(HarnessError, match=f'spec.{field}: Invalid value: "null"'):
        kubectl.apply(SERVER_SIDE, file)
    kubectl.apply(CLIENT_SIDE, file)
    kubectl.assert_applied_for_good(CLIENT_SIDE, file)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_suspended_by_hand_stays_so_unless_git_says_otherwise(
    mode: Mode, run: Story, operator: OperatorProcess, kubectl: Kubectl, manifest: Callable[..., Path]
) -> None:
    silent = manifest()
    kubectl.apply(mode, silent)
    run.to_training()
    run.cluster.edit({"runPolicy": {"suspend": True}})
    run.cluster.wait("no pod is left", lambda s: "no pod is left" in s["conditions"][0]["message"])
    kubectl.assert_applied_for_good(mode, silent)
    kubectl.apply(mode, manifest(runPolicy={"suspend": False}))
    run.training(attempt=2)


def test_the_operator_owns_nothing_that_git_could_say(
    run: Story, operator: OperatorProcess, kubectl: Kubectl, manifest: Callable[..., Path]
) -> None:
    """Neither does it hand on the marks by which a tool knows its own objects: it would prune the pods."""
    labels = {"app.kubernetes.io/instance": "team-a-runs", "kustomize.toolkit.fluxcd.io/name": "team-a-runs"}
    annotations = {"argocd.argoproj.io/tracking-id": "team-a-runs:internvl.dev/InternVLFineTune:team-a/run"}
    kubectl.apply(SERVER_SIDE, manifest(metadata={"labels": labels, "annotations": annotations}))
    run.to_training()
    run.to_the_end()
    metadata = run.cluster.get()["metadata"]
    assert (metadata["labels"], metadata["annotations"]) == (labels, annotations)
    assert "finalizers" not in metadata
    owned = {entry["manager"]: {*entry["fieldsV1"]} for entry in metadata["managedFields"]}
    assert owned["internvl-operator"] == {"f:status"}
    assert {*owned} == {"kustomize-controller", "internvl-operator"}
    for listing in (
        run.cluster.core.list_namespaced_pod,
        run.cluster.core.list_namespaced_service,
        run.cluster.core.list_namespaced_config_map,
    ):
        for child in listing(run.cluster.namespace, label_selector=SELECTOR).items:
            marks = {**child.metadata.labels, **(child.metadata.annotations or {})}
            assert not {*labels, *annotations} & {*marks}


# --- what leaves git


@pytest.mark.parametrize("cascade", ["background", "foreground"])  # Flux's way, and Argo CD's
def test_a_pruned_run_takes_its_children_along_and_starts_nothing(
    cascade: str, run: Story, operator: OperatorProcess, kubectl: Kubectl
) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    kubectl("delete", "internvlfinetune", "run", f"--cascade={cascade}", "--timeout=30s")
    wait_for("the children are gone", lambda: not any(cluster.children().values()))
    wait_for("nothing is remembered", lambda: operator.metric("internvl_operator_jobs") == 0)
    made = [pod.metadata.name for kind, pod in cluster.history(cluster.core.list_namespaced_pod) if kind == "ADDED"]
    assert sorted(made) == ["run-preflight-0", "run-train-0", "run-train-1"]


def test_a_renamed_run_goes_on_under_its_new_name_while_the_old_one_leaves(
    run: Story, operator: OperatorProcess, kubectl: Kubectl, manifest: Callable[..., Path]
) -> None:
    """A tool makes the new one before it deletes the old one."""
    cluster, mode = run.cluster, SERVER_SIDE
    kubectl.apply(mode, manifest("run"))
    run.to_training()
    kubectl.apply(mode, manifest("renamed"))
    cluster.delete("run")
    wait_for("the old one's children are gone", lambda: not any("run" in name.split("-") for name in cluster.pods()))
    for stage, ranks in (("preflight", 1), ("train", 2), ("publish", 1)):
        for rank in range(ranks):
            run.finish(f"renamed-{stage}-{rank}", stage)
    cluster.wait_condition("Complete", name="renamed")
    status = cluster.get("renamed")["status"]
    assert (status["attempt"], status["restarts"]) == (1, {"user": 0, "infrastructure": 0})
    assert cluster.children()["ConfigMap"] == cluster.children()["Service"] == ["ivft-renamed"]
    mounted = yaml.safe_load(
        cluster.core.read_namespaced_config_map("ivft-renamed", cluster.namespace).data["run.yaml"]
    )
    assert mounted["output"] == "s3://out/run"


# --- a namespace that goes


class Doomed:
    """A namespace with one run, and an operator of the whole cluster whose writes are counted."""

    def __init__(self, served: ApiServer, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess) -> None:
        self.server, self.proxy, self.operator = served, proxy, operator
        self.namespace = f"doomed-{uuid.uuid4().hex[:8]}"
        served.core.create_namespace({"metadata": {"name": self.namespace}})
        self.story = Story(Cluster(served, self.namespace), kubelet)

    def writes(self) -> list[str]:
        """What the operator wrote into the namespace, or tried to."""
        return [
            f"{each.method} {each.path}" for each in self.proxy.writes if f"/namespaces/{self.namespace}/" in each.path
        ]

    def gone(self) -> bool:
        try:
            self.server.core.read_namespace(self.namespace)
        except ApiException as error:
            return bool(error.status == 404)
        return False


@pytest.fixture
def doomed(cluster_of_test: Cluster, kubelet: FakeKubelet, tmp_path: Path) -> Iterator[Doomed]:
    with (
        FaultyProxy(cluster_of_test.server, tmp_path) as proxy,
        OperatorProcess(cluster_of_test, tmp_path, proxy.kubeconfig, NAMESPACES="") as operator,
    ):
        yield Doomed(cluster_of_test.server, kubelet, proxy, operator)


def training(story: Story) -> None:
    story.cluster.create()
    story.to_training()


def stalled(story: Story) -> None:
    story.cluster.create(model={"name": "InternVL2-1B", "source": "hf://OpenGVLab/InternVL2-2B"})
    story.cluster.wait_condition("Stalled")


def suspended(story: Story) -> None:
    training(story)
    story.cluster.edit({"runPolicy": {"suspend": True}})
    story.cluster.wait("no pod is left", lambda s: "no pod is left" in s["conditions"][0]["message"])


def published(story: Story) -> None:
    training(story)
    story.to_the_end()


@pytest.mark.parametrize("reach", [training, stalled, suspended, published])
def test_a_deleted_namespace_goes_with_all_that_is_in_it(
    reach: Callable[[Story], None], doomed: Doomed, run: Story
) -> None:
    reach(doomed.story)
    assert doomed.operator.remembered(doomed.namespace) == 1
    before = len(doomed.writes())
    doomed.server.core.delete_namespace(doomed.namespace)
    wait_for("the namespace is gone", doomed.gone, timeout=60)
    wait_for("it is forgotten", lambda: doomed.operator.remembered(doomed.namespace) == 0)
    run.cluster.create()
    run.to_training()
    told = run.cluster.core.list_namespaced_event
    wait_for("what was said before is out", lambda: told(run.cluster.namespace).items)  # events are sent in their order
    after = doomed.writes()[before:]
    assert len(after) <= 8, after
    run.to_the_end()  # dozens of passes later there is not one write more
    assert doomed.writes()[before:] == after
    assert doomed.operator.ready()
