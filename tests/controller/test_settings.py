"""What an administrator can set, and what a wrong value says."""

import json
import logging
from collections.abc import Iterator

import pytest
from internvl_api.validation.policy import Policy
from internvl_operator.__main__ import main
from internvl_operator.core.operator_config import PodDefaults
from internvl_operator.settings import Settings, SettingsError, variable


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def read(**given: str) -> Settings:
    return Settings.from_env({variable(name): value for name, value in given.items()})


def test_everything_has_a_default() -> None:
    settings = Settings.from_env({})
    assert settings.namespaces == ()
    assert settings.operator_config().trainer_image == settings.trainer_image


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        pytest.param("namespaces", "a, b,", ("a", "b"), id="list"),
        pytest.param("namespaces", "", (), id="empty-is-unset"),
        pytest.param("worker_threads", "16", 16, id="number"),
        pytest.param("progress_interval_seconds", "0.5", 0.5, id="seconds"),
        pytest.param("cache_host_path", "/mnt/x", "/mnt/x", id="path"),
        pytest.param("gpu_memory", "80Gi", "80Gi", id="memory"),
        pytest.param("policy", '{"images": ["a/"]}', Policy(images=("a/",)), id="policy"),
        pytest.param("pod_defaults", '{"nodeSelector": {"a": "b"}}', PodDefaults(node_selector={"a": "b"}), id="pods"),
        pytest.param(
            "stage_resources", json.dumps({"limits": {"cpu": "1"}}), {"limits": {"cpu": "1"}}, id="json-resources"
        ),
    ],
)
def test_a_setting_is_read(name: str, text: str, value: object) -> None:
    assert getattr(read(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("worker_threads", "many", id="not-a-number"),
        pytest.param("worker_threads", "0", id="too-small"),
        pytest.param("metrics_port", "70000", id="no-such-port"),
        pytest.param("stage_resources", "{cpu: 1", id="not-json"),
        pytest.param("cache_host_path", "relative", id="relative-path"),
        pytest.param("gpu_memory", "80 gigs", id="no amount of memory"),
        pytest.param("image_pull_policy", "Sometimes", id="no-such-policy"),
        pytest.param("retry_base_seconds", "-1", id="negative"),
        pytest.param("scratch_size_limit", "much", id="no amount of disk"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_found(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{name: text})
    assert str(caught.value).startswith(f"{variable(name)}: found {text!r}")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        pytest.param("policy", '{"images": "a/"}', "POLICY.images: found 'a/'", id="not-a-list"),
        pytest.param("policy", '{"image": ["a/"]}', "POLICY.image: found ['a/']", id="no-such-list"),
        pytest.param("policy", '{"images": ["a/*"]}', "POLICY.images.0: found 'a/*'", id="a-glob"),
        pytest.param("pod_defaults", '{"hostNetwork": true}', "POD_DEFAULTS.hostNetwork: found True", id="no-default"),
        pytest.param("pod_security", '{"runAsUser": 0}', "POD_SECURITY.runAsUser: found 0", id="root"),
        pytest.param("pod_security", '{"privileged": 1}', "POD_SECURITY.privileged: found 1", id="not-an-identity"),
    ],
)
def test_a_wrong_part_of_a_setting_is_named(name: str, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{name: text})
    assert said in str(caught.value)


def test_the_pods_of_a_setting() -> None:
    options = read(trainer_image="mine:2", retry_base_seconds="1", force_delete_after_seconds="7").operator_config()
    assert (options.trainer_image, options.retry_base, options.force_delete_after) == ("mine:2", 1.0, 7.0)


@pytest.mark.parametrize(
    ("given", "identity"),
    [
        pytest.param({}, {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001}, id="the-images-user"),
        pytest.param({"pod_security": "{}"}, {}, id="left-out"),
        pytest.param({"pod_security": '{"runAsUser": null, "fsGroup": 0}'}, {"fsGroup": 0}, id="null-is-left-out"),
    ],
)
def test_the_identity_of_the_pods_of_runs(given: dict[str, str], identity: dict[str, int]) -> None:
    assert read(**given).operator_config().pod_security.to_dict() == identity


def test_help_lists_every_variable_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in Settings.model_fields:
        assert variable(name) in shown
    assert "INTERNVL_OPERATOR_PROGRESS_INTERVAL_SECONDS=5.0" in shown


def test_a_wrong_setting_ends_the_program_with_a_word_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable("worker_threads"), "many")
    assert main([]) == 2
    assert "INTERNVL_OPERATOR_WORKER_THREADS: found 'many'" in capsys.readouterr().err


def test_no_cluster_ends_the_program_with_a_word_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/does/not/exist")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/does/not/exist")
    assert main([]) == 1
    assert "KUBECONFIG" in capsys.readouterr().err
