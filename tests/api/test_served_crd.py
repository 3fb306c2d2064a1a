"""The CRD on a real server, through kubectl: lists by field, and refusals that name the field."""

import json
import subprocess
from collections.abc import Iterator

import pytest
from api.test_wrong_resources import RIGHT, known, kubectl  # noqa: F401  (a fixture)
from controller.operator_process import Cluster
from internvl_api.constants import API_VERSION, GROUP, KIND, PLURAL, VERSION
from internvl_api.crd import build_crd
from ivft_cluster.api_server import ApiServer

pytestmark = pytest.mark.integration

RUNS = {
    "a": {"recipe": "internvl2-2b-lora", "method": "lora"},
    "b": {"recipe": "internvl2-2b-lora", "method": "full"},
    "c": {"model": {"name": "InternVL2-1B"}, "method": "lora"},
}


@pytest.fixture
def cluster(known: ApiServer) -> Iterator[Cluster]:  # noqa: F811
    with known.namespace("served") as namespace:
        yield Cluster(known, namespace)


def asked(cluster: Cluster, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return kubectl(cluster.server, "-n", cluster.namespace, *words, stdin=stdin)


def test_runs_are_listed_by_what_they_are_and_how_they_do(cluster: Cluster) -> None:
    for name, fields in RUNS.items():
        cluster.create(name, **({"model": {}} | fields))
    cluster.patch_status({"phase": "Running", "stage": "train"}, "a")
    cluster.patch_status({"phase": "Failed", "stage": "train"}, "b")

    def found(selector: str) -> str:
        return asked(cluster, "get", "ivft", "--field-selector", selector, "-o", "name").stdout.replace(
            "internvlfinetune.internvl.dev/", ""
        )

    assert found("status.phase=Running").split() == ["a"]
    assert found("status.phase!=Running").split() == ["b", "c"]
    assert found("status.stage=train,status.phase=Failed").split() == ["b"]
    assert found("spec.recipe=internvl2-2b-lora").split() == ["a", "b"]
    assert found("spec.method=lora,spec.recipe!=internvl2-2b-lora").split() == ["c"]
    assert found("spec.model.name=InternVL2-1B").split() == ["c"]
    refused = asked(cluster, "get", "ivft", "--field-selector", "spec.workers=1")
    assert "field label not supported: spec.workers" in refused.stderr
    selectable = {each["jsonPath"] for each in build_crd()["spec"]["versions"][0]["selectableFields"]}
    assert selectable == {".spec.recipe", ".spec.method", ".spec.model.name", ".status.phase", ".status.stage"}


def test_an_output_that_may_not_change_is_named(cluster: Cluster) -> None:
    made = cluster.create(**RIGHT)
    cluster.patch_status({"checkpoint": {"step": 5, "uri": "s3://models/out/checkpoints/step-00000005"}})
    wanted = {key: made[key] for key in ("apiVersion", "kind")} | {
        "metadata": {"name": "run"}, "spec": made["spec"] | {"output": "s3://models/new"}
    }  # fmt: skip
    refused = asked(cluster, "apply", "-f", "-", stdin=json.dumps(wanted))
    assert refused.returncode == 1
    assert "spec.output: Invalid value: " in refused.stderr
    assert (
        "cannot change while it holds this run's checkpoints; create another resource to start over there "
        "(found 's3://models/new', expected 's3://models/out')"
    ) in refused.stderr
    assert "<nil>" not in refused.stderr


def test_a_variable_for_the_hub_is_seen_by_its_name(cluster: Cluster) -> None:
    hub = {"publish": {"hub": {"repository": "team/model"}}}
    cluster.create("with-token", **hub, podTemplate={"env": [{"name": "HF_TOKEN", "value": "from-elsewhere"}]})
    other = cluster.create("other") | {"status": {}}
    other["spec"] |= hub | {"podTemplate": {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}}
    refused = asked(cluster, "apply", "-f", "-", stdin=json.dumps(other))
    assert "spec.secrets.huggingFace: Required value: required because publish.hub is team/model" in refused.stderr


def test_a_run_is_scaled_by_its_workers(cluster: Cluster) -> None:
    """The scale subresource is also what a PodDisruptionBudget with maxUnavailable asks."""
    cluster.create("scaled", workers=2)
    scaled = asked(cluster, "scale", "ivft/scaled", "--replicas=4")
    assert scaled.returncode == 0, scaled.stderr
    assert asked(cluster, "get", "ivft", "scaled", "-o", "jsonpath={.spec.workers}").stdout == "4"


DEEP = '{"a":' * 400 + "1" + "}" * 400


@pytest.mark.parametrize(
    ("section", "text", "validation", "refusal"),
    [
        pytest.param(
            "podTemplate",
            '{"volumes": [{"name": "x", "iscsi": {"lun": 1}}]}',
            "Strict",
            'unknown field "spec.podTemplate.volumes[0].iscsi"',
            id="a volume of an unknown kind",
        ),
        pytest.param(
            "podTemplate",
            '{"volumes": [{"name": "x", "iscsi": {"lun": 1}}]}',
            "Ignore",
            "found 0 kinds of volume, expected exactly one of emptyDir, ",
            id="a volume of an unknown kind from a lenient client",
        ),
        pytest.param(
            "training",
            f'{{"deepspeed": {DEEP}}}',
            "Strict",
            'unknown field "spec.training.deepspeed.a"',
            id="DeepSpeed's settings 400 levels deep",
        ),
        pytest.param(
            "podTemplate",
            json.dumps({"env": [{"name": "A", "value": "x" * 70_000}]}),
            "Strict",
            "spec.podTemplate.env[0].value: Too long: may not be more than 32768 ",
            id="a variable of 70,000 characters",
        ),
    ],
)
def test_the_schema_is_the_boundary(cluster: Cluster, section: str, text: str, validation: str, refusal: str) -> None:
    refused = _created(cluster, section, text, validation)
    assert refused.returncode == 1
    assert refusal in refused.stderr


def test_a_lenient_client_stores_no_unknown_settings(cluster: Cluster) -> None:
    """The server drops what the schema does not know, at any depth."""
    made = _created(cluster, "training", f'{{"deepspeed": {DEEP[:-1]}, "gradient_clipping": 1}}}}', "Ignore")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["spec"]["training"] == {"deepspeed": {"gradient_clipping": 1}}


def _created(cluster: Cluster, section: str, text: str, validation: str) -> "subprocess.CompletedProcess[str]":
    sent = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "hostile"}, "spec": RIGHT | {section: "MARK"}}
    body = json.dumps(sent).replace('"MARK"', text)  # the text may be nested too deep for Python's encoder
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{cluster.namespace}/{PLURAL}?fieldValidation={validation}"
    return asked(cluster, "create", "--raw", path, "-f", "-", stdin=body)


def test_explain_shows_the_parts_of_a_pod(cluster: Cluster) -> None:
    told = asked(cluster, "explain", "ivft.spec.podTemplate.volumes.persistentVolumeClaim")
    assert told.returncode == 0, told.stderr
    assert "PersistentVolumeClaim of the run's namespace" in told.stdout
    assert "claimName" in told.stdout
