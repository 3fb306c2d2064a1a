"""How a run's pods reach other networks: the administrator's proxies and authorities, as variables of the trainer."""

from pathlib import PurePosixPath
from typing import Any

from internvl_api.constants import CONFIG_PATH

from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import names
from internvl_operator.core.run import Run

CA_KEY = "ca-bundle.crt"  # of the run's ConfigMap, which its pods mount as a folder
CA_PATH = str(PurePosixPath(CONFIG_PATH).with_name(CA_KEY))
# Python's ssl, urllib3 and httpx read the first; requests the second; boto3 the third; libcurl the last.
_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CURL_CA_BUNDLE")
# The cluster's names; the addresses from which AWS and EKS hand out credentials. Some clients read no ranges.
_DIRECT = ("localhost", "127.0.0.1", "::1", ".svc", ".cluster.local", "169.254.169.254", "169.254.170.23")


def env(run: Run, config: OperatorConfig) -> list[dict[str, Any]]:
    """The variables, without those that podTemplate.env sets.

    Clients read proxies in upper or in lower case, so a run that sets one of the two gets neither from here.
    """
    taken = {item["name"].lower() for item in run.spec.pod_template.env}
    wanted = _proxies(run, config) | _authorities(config)
    return [{"name": name, "value": value} for name, value in wanted.items() if name.lower() not in taken]


def _proxies(run: Run, config: OperatorConfig) -> dict[str, str]:
    proxy, service = config.proxy, names.service(run.name)
    if not proxy.is_set:
        return {}
    direct = ",".join(filter(None, (*_DIRECT, service, f".{service}", proxy.no_proxy)))
    given = {"HTTP_PROXY": proxy.http, "HTTPS_PROXY": proxy.https, "NO_PROXY": direct}
    return {each: value for name, value in given.items() if value for each in (name, name.lower())}


def _authorities(config: OperatorConfig) -> dict[str, str]:
    return dict.fromkeys(_CA_VARIABLES, CA_PATH) if config.ca_bundle else {}
