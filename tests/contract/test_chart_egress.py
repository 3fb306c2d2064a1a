"""The chart's proxy and caBundle: what the operator's pod gets of them, and what it passes on to the pods of runs."""

from __future__ import annotations

from typing import Any

import pytest
from contract.test_chart import container, environment, kind
from internvl_operator.core.operator_config import Proxy
from internvl_operator.settings import Settings
from ivft_cluster import helm
from kubernetes import client
from urllib3 import ProxyManager

PROXY = {"http": "http://proxy.example:8080", "https": "http://proxy.example:3128", "noProxy": "10.0.0.0/8,s3.local"}
NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def own(values: dict[str, Any]) -> dict[str, str]:
    """The variables that are no setting."""
    names = [each["name"] for each in container(values)["env"]]
    assert len(names) == len(set(names))
    return {name: value for name, value in environment(values).items() if not name.startswith("INTERNVL_OPERATOR_")}


def test_without_values_there_is_no_variable_and_no_volume() -> None:
    assert own({}) == {}
    (deployment,) = kind(helm.template(), "Deployment")
    assert [each["name"] for each in deployment["spec"]["template"]["spec"]["volumes"]] == ["tmp"]


def test_the_operator_and_runs_get_the_proxies() -> None:
    found = own({"proxy": PROXY})
    assert found.keys() == {*NAMES, *(name.lower() for name in NAMES)}
    assert all(found[name] == found[name.lower()] for name in NAMES)
    assert (found["HTTP_PROXY"], found["HTTPS_PROXY"]) == (PROXY["http"], PROXY["https"])
    read = Settings.from_env(environment({"proxy": PROXY}))
    assert read.proxy == Proxy.model_validate(PROXY)


def test_more_direct_names_alone_are_passed_on() -> None:
    """Runs may set a proxy with a password from a Secret of theirs."""
    values = {"proxy": {"noProxy": "s3.local"}}
    assert own(values).keys() == {"NO_PROXY", "no_proxy"}
    assert Settings.from_env(environment(values)).operator_config().proxy.no_proxy == "s3.local"


@pytest.mark.parametrize("address", ["10.96.0.1", "192.168.0.1", "fd00::1"])
def test_the_operator_reaches_the_api_server_without_the_proxy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"[{address}]" if ":" in address else address
    for proxied in (True, False):
        for name, value in own({"proxy": {"https": PROXY["https"]}}).items():
            monkeypatch.setenv(
                name, value.replace("$(KUBERNETES_SERVICE_HOST)", "unknown.example" if proxied else address)
            )
        configuration = client.Configuration()
        configuration.host = f"https://{host}:443"
        assert isinstance(client.ApiClient(configuration).rest_client.pool_manager, ProxyManager) == proxied


def test_the_bundle_is_mounted_under_one_name_whatever_its_key() -> None:
    values = {"caBundle": {"configMap": "company-ca", "key": "all.pem"}}
    (deployment,) = kind(helm.template(values), "Deployment")
    (volume,) = [each for each in deployment["spec"]["template"]["spec"]["volumes"] if each["name"] == "ca-bundle"]
    assert volume["configMap"] == {"name": "company-ca", "items": [{"key": "all.pem", "path": "ca.crt"}]}
    (mount,) = [each for each in container(values)["volumeMounts"] if each["name"] == "ca-bundle"]
    path = f"{mount['mountPath']}/ca.crt"
    assert own(values) == dict.fromkeys(CA_VARIABLES, path)
    assert str(Settings.from_env(environment(values)).ca_bundle) == path


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
def test_extra_env_wins_in_whichever_case_it_is_written(name: str) -> None:
    found = own({"proxy": PROXY, "extraEnv": [{"name": name, "value": "http://mine:1"}]})
    assert {key: value for key, value in found.items() if key.lower() == "https_proxy"} == {name: "http://mine:1"}
    assert found["HTTP_PROXY"] == PROXY["http"]


@pytest.mark.parametrize("name", ["http", "https"])
@pytest.mark.parametrize("url", ["http://me:hunter22@proxy:3128", "me:hunter22@proxy:3128", "http://hunter22@proxy"])
def test_a_password_is_refused_with_a_message_that_does_not_show_it(name: str, url: str) -> None:
    with pytest.raises(helm.HelmRenderError) as caught:
        helm.template({"proxy": {name: url}})
    text = str(caught.value)
    assert f"proxy.{name}: found a user name or a password, expected http://host:port" in text
    assert "podTemplate.env from a Secret" in text
    assert "hunter22" not in text


@pytest.mark.parametrize("url", ["proxy:3128", "socks5://proxy:1080", "http://proxy:3128/path"])
def test_a_wrong_address_of_a_proxy_is_named(url: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=r"proxy\.https: found .*expected http://host:port"):
        helm.template({"proxy": {"https": url}})


def test_both_together_pass_the_linter() -> None:
    assert helm.lint({"proxy": PROXY, "caBundle": {"configMap": "company-ca"}}) == []
