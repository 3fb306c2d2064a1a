"""Proxies and certificate authorities of the administrator in the pods of runs, and how clients understand them."""

import os
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import httpx2 as httpx  # huggingface_hub's
import pytest
from controller.builders import Raw, a_run
from controller.fake_server import clock
from controller.simulator import SETTINGS, Operator, World
from internvl_api.constants import CONFIG_PATH
from internvl_operator.core.operator_config import OperatorConfig, Proxy
from internvl_operator.core.resources import config_map, names, pods
from internvl_operator.core.stages import Stage
from internvl_operator.settings import Settings, SettingsError, variable
from ivft_cluster.pki import Authority
from pydantic import ValidationError

HTTPS, HTTP = "http://proxy.example:3128", "http://proxy.example:8080"
PROXY = Proxy(http=HTTP, https=HTTPS, no_proxy="10.0.0.0/8,store.example")
CA_PATH = "/etc/internvl/ca-bundle.crt"
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def environment(config: OperatorConfig, stage: Any = "train", name: str = "run", **changes: Any) -> Raw:
    (container,) = pods.build(a_run(name, **changes), Stage(stage), 1, 0, config)["spec"]["containers"]
    variables = [item["name"] for item in container["env"]]
    assert len(variables) == len(set(variables)), "server-side apply keys on the name"
    return {item["name"]: item.get("value") for item in container["env"]}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    Authority.create(tmp_path / "pki")
    return tmp_path / "pki/ca.crt"


def test_without_the_settings_pods_have_no_variable() -> None:
    assert not environment(OperatorConfig()).keys() & {*PROXY_VARIABLES, *CA_VARIABLES}
    assert config_map.build(a_run(), "text", OperatorConfig())["data"] == {"run.yaml": "text"}


@pytest.mark.parametrize("stage", ["preflight", "train", "publish"])
def test_every_stage_gets_the_proxies_in_both_cases(stage: str) -> None:
    found = environment(OperatorConfig(proxy=PROXY), stage)
    assert (found["HTTP_PROXY"], found["HTTPS_PROXY"]) == (HTTP, HTTPS)
    assert all(found[name] == found[name.lower()] for name in PROXY_VARIABLES)
    assert not found.keys() & set(CA_VARIABLES)


def test_one_proxy_alone_gives_only_its_variable() -> None:
    found = environment(OperatorConfig(proxy=Proxy(https=HTTPS)))
    assert "HTTP_PROXY" not in found
    assert (found["https_proxy"], found["no_proxy"]) == (HTTPS, found["NO_PROXY"])


# A shortened run name too: its Service has a digest.
@pytest.mark.parametrize("name", ["run", "v1.5-of-a-very-long-name-that-is-shortened-to-fit"])
def test_clients_reach_the_cluster_and_the_run_directly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(OperatorConfig(proxy=PROXY), name=name)
    for variable_name in PROXY_VARIABLES:
        monkeypatch.setenv(variable_name, found[variable_name])
    master, service = found["MASTER_ADDR"], names.service(name)
    direct = [
        "localhost", "127.0.0.1", service, master, f"{master}.team.svc", f"{master}.team.svc.cluster.local",
        "minio.storage.svc", "kubernetes.default.svc.cluster.local", "store.example", "169.254.169.254",
    ]  # fmt: skip
    assert [host for host in direct if not urllib.request.proxy_bypass_environment(host)] == []
    assert [host for host in direct if not _botocore_bypasses(host)] == []
    assert not urllib.request.proxy_bypass_environment("huggingface.co")
    assert not _botocore_bypasses("s3.amazonaws.com")
    assert urllib.request.getproxies_environment()["https"] == HTTPS


def _botocore_bypasses(host: str) -> bool:
    from botocore.utils import should_bypass_proxies

    return bool(should_bypass_proxies(f"https://{host}/"))


def test_httpx_of_the_hub_takes_the_proxy_but_not_for_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(OperatorConfig(proxy=PROXY))
    for variable_name in PROXY_VARIABLES:
        monkeypatch.setenv(variable_name, found[variable_name])
    with httpx.Client() as client:
        for url, proxied in (("https://huggingface.co", True), (f"https://{found['MASTER_ADDR']}", False),
                             ("https://minio.storage.svc", False), ("https://store.example", False)):  # fmt: skip
            transport = client._transport_for_url(httpx.URL(url))
            assert hasattr(transport._pool, "_proxy_url") == proxied, url


@pytest.mark.parametrize("given", ["HTTPS_PROXY", "https_proxy"])
def test_a_runs_own_variable_wins_in_whichever_case_it_is_written(given: str) -> None:
    """Clients prefer one case, so the administrator's in the other case would win by accident."""
    found = environment(OperatorConfig(proxy=PROXY), podTemplate={"env": [{"name": given, "value": "http://mine:1"}]})
    assert {name: found[name] for name in found if name.lower() == "https_proxy"} == {given: "http://mine:1"}
    assert found["HTTP_PROXY"] == HTTP


def test_a_runs_own_bundle_wins(bundle: Path) -> None:
    mine = {"name": "AWS_CA_BUNDLE", "value": "/mine.crt"}
    found = environment(OperatorConfig(ca_bundle=bundle.read_text()), podTemplate={"env": [mine]})
    assert [found[name] for name in CA_VARIABLES] == [CA_PATH, CA_PATH, "/mine.crt", CA_PATH]


def test_the_bundle_is_in_the_folder_that_every_pod_mounts(bundle: Path) -> None:
    config, text = OperatorConfig(ca_bundle=bundle.read_text()), bundle.read_text()
    made = config_map.build(a_run(), "text", config)
    assert made["data"] == {"run.yaml": "text", Path(CA_PATH).name: text}
    pod = pods.build(a_run(), Stage("preflight"), 1, 0, config)
    (container,) = pod["spec"]["containers"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "config"]
    (volume,) = [each for each in pod["spec"]["volumes"] if each["name"] == "config"]
    assert mount["mountPath"] == str(Path(CA_PATH).parent) == str(Path(CONFIG_PATH).parent)
    assert volume["configMap"] == {"name": made["metadata"]["name"]}  # every key of it


@pytest.mark.parametrize(
    "url", ["http://me:hunter22@proxy:3128", "me:hunter22@proxy", "https://hunter22@proxy/", "http://me:hunter/22@p"]
)
def test_a_password_is_refused_and_shown_nowhere(url: str) -> None:
    with pytest.raises(ValidationError) as found:
        Proxy(https=url)
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable("proxy"): f'{{"https": "{url}"}}'})
    with pytest.raises(SettingsError) as broken:
        Settings.from_env({variable("proxy"): f'{{"https": "{url}"'})
    assert "found a user name or a password, expected http://host:port" in str(caught.value)
    assert "podTemplate.env from a Secret" in str(caught.value)
    for text in (str(found.value), str(caught.value), str(broken.value)):
        assert "hunter" not in text


@pytest.mark.parametrize("url", ["proxy:3128", "socks5://proxy:1080", "http://proxy:3128/path", "http://a b"])
def test_a_wrong_proxy_is_named(url: str) -> None:
    with pytest.raises(SettingsError, match=r"PROXY\.https: found '.*expected http://host:port"):
        Settings.from_env({variable("proxy"): f'{{"https": "{url}"}}'})


def test_the_bundle_is_read_from_its_file(bundle: Path) -> None:
    settings = Settings.from_env({variable("ca_bundle"): str(bundle)})
    assert settings.operator_config().ca_bundle == bundle.read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param("", "expected certificates", id="empty"),
        pytest.param("x" * (384 * 1024 + 1), "more than 393216 bytes", id="too-large"),
        pytest.param("no certificate", "expected certificates", id="not-pem"),
        pytest.param("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "expected cert", id="broken"),
        pytest.param("-----BEGIN EC PRIVATE KEY-----\nhunter22\n", "found a private key", id="a-key"),
    ],
)
def test_an_unusable_bundle_ends_the_start_with_a_word(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    path.write_text(content)
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable("ca_bundle"): str(path)}).operator_config()
    text = str(caught.value)
    assert text.startswith(f"INTERNVL_OPERATOR_CA_BUNDLE: {path}: ")
    assert said in text
    assert "hunter22" not in text


def test_an_absent_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        Settings.from_env({variable("ca_bundle"): str(tmp_path / "ca.crt")}).operator_config()


def test_the_images_own_bundle_fits(tmp_path: Path) -> None:
    """A company's authority is usually appended to the public ones."""
    path = ssl.get_default_verify_paths().cafile
    if path is None or not os.path.exists(path):
        pytest.skip("this machine has no list of public authorities")
    assert Settings.from_env({variable("ca_bundle"): path}).operator_config().ca_bundle


# --- stories


def with_settings(world: World, bundle: Path | None, **changes: Any) -> None:
    """An administrator upgrades the release, after the pods had time to start."""
    clock(world.server, 15)
    world.operator = Operator(world.server, SETTINGS.model_copy(update={"ca_bundle": bundle, **changes}))
    world.operator.settle()


def data(world: World) -> Raw:
    found: Raw = world.server.objects["ConfigMap"]["ivft-run"]["data"]
    return found


def variables(world: World, pod: str) -> Raw:
    (container,) = world.server.pods[pod]["spec"]["containers"]
    return {item["name"]: item.get("value") for item in container["env"]}


def test_pods_that_wait_get_a_new_proxy_and_bundle(bundle: Path) -> None:
    world = World()
    with_settings(world, bundle, proxy=PROXY)
    assert data(world)["ca-bundle.crt"] == bundle.read_text()
    assert variables(world, "run-preflight-0")["https_proxy"] == HTTPS
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.operator.run_pass() == 0, "the copy in the cache is recognised"


def test_pods_that_run_keep_theirs_until_the_next_stage(bundle: Path) -> None:
    world = World()
    world.reach("train")
    with_settings(world, bundle, proxy=PROXY)
    assert world.server.attempts("train") == {"1"}
    assert "HTTPS_PROXY" not in variables(world, "run-train-0")
    world.pass_stage("train")
    assert variables(world, "run-publish-0")["SSL_CERT_FILE"] == CA_PATH
    assert data(world)["ca-bundle.crt"] == bundle.read_text()


def test_a_bundle_that_is_taken_away_leaves_the_next_pods_without_it(bundle: Path) -> None:
    world = World()
    with_settings(world, bundle)
    with_settings(world, None)
    assert "SSL_CERT_FILE" not in variables(world, "run-preflight-0")
