"""`internvl-operator`: runs until SIGTERM. Everything is set by environment variables; see --help."""

import argparse
import logging
import sys

import kopf
from kubernetes.config import ConfigException
from prometheus_client import start_http_server

from internvl_operator import handlers  # noqa: F401  registers them with kopf
from internvl_operator.cluster.api import Api
from internvl_operator.controller import Controller
from internvl_operator.settings import Settings, SettingsError, help_text, variable

_ABOUT = """\
Reconciles InternVLFineTune resources: preflight, train, publish, as groups of pods.

Finds the cluster as kubectl does: a pod's service account, else KUBECONFIG or ~/.kube/config.
Serves GET /healthz (liveness) and /metrics (Prometheus). Needs no volume and no permission to read Secrets.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after SIGTERM, 2 for a setting that cannot be used, 1 for a cluster or port that cannot be had."""
    parser = argparse.ArgumentParser(
        prog="internvl-operator",
        description=_ABOUT,
        epilog=f"environment variables and their defaults:\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    try:
        settings = Settings.from_env()
        _set_up_logging(settings)
        api = Api.connect(timeout=settings.request_timeout_seconds, connections=4 * settings.worker_threads + 8)
    except SettingsError as error:
        return _complain(2, f"{error}\nTry `internvl-operator --help`.")
    except ConfigException as error:
        return _complain(1, f"no cluster: {error}\nSet KUBECONFIG, or run inside a pod with a service account.")
    try:
        start_http_server(settings.metrics_port)
    except OSError as error:
        return _complain(1, f"{variable('metrics_port')}: port {settings.metrics_port}: {error}")
    run(settings, api)
    return 0


def run(settings: Settings, api: Api) -> None:
    """Serve until the process is told to stop."""
    kopf.run(
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        standalone=True,
        liveness_endpoint=f"http://0.0.0.0:{settings.liveness_port}/healthz",
        memo=kopf.Memo(settings=settings, api=api, controller=Controller(settings, api)),
    )


def _set_up_logging(settings: Settings) -> None:
    kopf.configure(log_format=kopf.LogFormat.JSON if settings.log_format == "json" else kopf.LogFormat.FULL)
    logging.getLogger().setLevel(settings.log_level)
    for noisy in ("urllib3", "kopf.objects", "kopf.activities", "aiohttp.access"):  # every event, every probe
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _complain(code: int, message: str) -> int:
    print(f"internvl-operator: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
