"""Which keys of which Secret each stage's pods get."""

from typing import get_args

import pytest
from controller.builders import Raw
from controller.test_resources import build, container
from internvl_api.status import StageName
from internvl_operator.core.stages import Stage

HUB = {"hub": {"repository": "team/model"}}


def from_secrets(pod: Raw) -> set[tuple[str, str]]:
    """(Secret, key) of each variable, whose name is the key; an optional key ends with "?"."""
    assert "envFrom" not in container(pod)
    assert not [each for each in pod["spec"]["volumes"] if "secret" in each or "projected" in each]
    named = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container(pod)["env"] if "valueFrom" in each}
    assert all(name == reference["key"] for name, reference in named.items())
    return {
        (reference["name"], reference["key"] + ("?" if reference.get("optional") else ""))
        for reference in named.values()
    }


STORAGE = {
    ("s3", key)
    for key in (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN?", "AWS_ENDPOINT_URL?",
        "AWS_ENDPOINT_URL_S3?", "AWS_REGION?", "AWS_DEFAULT_REGION?", "AWS_REQUEST_CHECKSUM_CALCULATION?",
        "AWS_RESPONSE_CHECKSUM_VALIDATION?",
    )
}  # fmt: skip
AZURE = {
    ("s3", f"{key}?")
    for key in (
        "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_TOKEN", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET",
    )
}  # fmt: skip
GOOGLE = {("s3", "GOOGLE_APPLICATION_CREDENTIALS_JSON?")}
OPTIONAL_S3 = {(secret, f"{key.removesuffix('?')}?") for secret, key in STORAGE}
READ = {("hub", "HF_TOKEN")}
WRITE = READ | {("hub", "HF_WRITE_TOKEN?")}


@pytest.mark.parametrize("stage", get_args(StageName))
@pytest.mark.parametrize(
    ("model", "publish", "others", "publishing"),
    [
        pytest.param("s3://models/tiny", HUB, set(), WRITE, id="to-the-hub"),
        pytest.param("hf://OpenGVLab/InternVL2-1B", {}, READ, set(), id="from-the-hub"),
        pytest.param("hf://OpenGVLab/InternVL2-1B", HUB, READ, WRITE, id="from-and-to-the-hub"),
        pytest.param("s3://models/tiny", {}, set(), set(), id="no-hub"),
    ],
)
def test_a_stage_gets_exactly_these_keys(
    stage: StageName, model: str, publish: Raw, others: set[tuple[str, str]], publishing: set[tuple[str, str]]
) -> None:
    changes: Raw = {"model": {"source": model}, "publish": publish}
    pod = build(Stage(stage), secrets={"objectStorage": "s3", "huggingFace": "hub"}, **changes)
    reading = set() if stage in ("doctor", "baseline-score", "score") else others
    assert from_secrets(pod) == STORAGE | (publishing if stage == "publish" else reading)
    env_token = {"podTemplate": {"env": [{"name": "HF_TOKEN", "value": "own"}]}}
    assert from_secrets(build(Stage(stage), secrets={}, **changes, **env_token)) == set()


@pytest.mark.parametrize(
    ("output", "model", "keys"),
    [
        pytest.param("az://models/run", "az://models/tiny", OPTIONAL_S3 | AZURE, id="azure"),
        pytest.param("gs://models/run", "gs://models/tiny", OPTIONAL_S3 | GOOGLE, id="google"),
        pytest.param("az://models/run", "gs://models/tiny", OPTIONAL_S3 | GOOGLE | AZURE, id="both"),
        pytest.param("s3://models/run", "gs://models/tiny", STORAGE | GOOGLE, id="s3 and google"),
    ],
)
def test_a_stage_gets_the_keys_of_the_stores_that_its_run_names(
    output: str, model: str, keys: set[tuple[str, str]]
) -> None:
    data = {"train": {"pets": {"annotation": f"{model}/train.jsonl"}}}
    pod = build(secrets={"objectStorage": "s3"}, output=output, model={"source": model}, data=data)
    assert from_secrets(pod) == keys


@pytest.mark.parametrize("stage", get_args(StageName))
@pytest.mark.parametrize(
    ("tracking", "keys"),
    [
        pytest.param({"service": "wandb"}, {"WANDB_API_KEY"}, id="wandb"),
        pytest.param({"service": "swanlab"}, {"SWANLAB_API_KEY"}, id="swanlab"),
        pytest.param({"service": "wandb", "offline": True}, set(), id="no server"),
        pytest.param(
            {"service": "mlflow", "url": "http://mlflow.ml.svc:5000"},
            {"MLFLOW_TRACKING_TOKEN?", "MLFLOW_TRACKING_USERNAME?", "MLFLOW_TRACKING_PASSWORD?"},
            id="mlflow",
        ),
        pytest.param(None, set(), id="no tracker"),
    ],
)
def test_only_stages_that_report_get_the_trackers_key(stage: StageName, tracking: Raw | None, keys: set[str]) -> None:
    pod = build(Stage(stage), secrets={"tracking": "tracker"}, tracking=tracking)
    silent = stage in ("preflight", "doctor", "merge")
    assert from_secrets(pod) == {("tracker", key) for key in keys if not silent}


def test_a_variable_of_the_user_replaces_a_key_of_a_secret() -> None:
    pod = build(podTemplate={"env": [{"name": "AWS_REGION", "value": "eu-1"}]})
    assert [each for each in container(pod)["env"] if each["name"] == "AWS_REGION"] == [
        {"name": "AWS_REGION", "value": "eu-1"}
    ]
