"""The command `internvl-operator`: run until SIGTERM. Environment variables set everything; see --help."""

import argparse
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial

import kopf
from kubernetes.config import ConfigException

from internvl_operator import (
    handlers,  # noqa: F401  registers the handlers with kopf
    metrics_server,
    webhook,
)
from internvl_operator.certificate_keeper import CertificateKeeper
from internvl_operator.controller import Controller
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.health import Health
from internvl_operator.http_server import TlsFolder
from internvl_operator.kube import namespace_defaults
from internvl_operator.kube.client import Api
from internvl_operator.kube.lease import LeaseClient
from internvl_operator.kube.webhook_objects import WebhookObjects
from internvl_operator.leader_election import Leadership
from internvl_operator.notifier import TargetsError, read_targets
from internvl_operator.settings import Settings, SettingsError, help_text, variable

_ABOUT = """\
Reconciles InternVLFineTune resources: preflight, train, publish, as groups of pods.

Finds the cluster as kubectl does: a pod's service account, else KUBECONFIG or ~/.kube/config.
Serves GET /healthz (liveness), /readyz and /metrics (Prometheus). Needs no volume.
The only Secret that it reads holds its own webhook's certificate.
"""


# Levels of nested JSON that can be decoded. An API server refuses more than 10,000, so no object of a tenant can raise
# RecursionError in kopf's decoder, which would end the process. 8 MiB of stack suffice for three times as many.
_NESTING = 12_000


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 after SIGTERM, 2 for an invalid setting, 1 for an unreachable cluster or a port in use.

    The process exits with 3 at once when another replica may lead.
    """
    parser = argparse.ArgumentParser(
        prog="internvl-operator",
        description=_ABOUT,
        epilog=f"environment variables and their defaults:\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    sys.setrecursionlimit(_NESTING)
    try:
        settings = Settings.from_env()
        config = settings.operator_config()
        if settings.notifications:
            read_targets(settings.notifications)
        _set_up_logging(settings)
        api = Api.connect(timeout=settings.request_timeout_seconds, connections=4 * settings.worker_threads + 8)
    except SettingsError as error:
        return _complain(2, f"{error}\nTry `internvl-operator --help`.")
    except TargetsError as error:
        return _complain(2, f"{variable('notifications')}: {error}")
    except ConfigException as error:
        return _complain(
            1, f"no cluster configured: {error}\nSet KUBECONFIG, or run inside a pod with a service account."
        )
    health = Health()
    if settings.leader_election:
        api.time_left = lambda: 0.0  # no write before this replica leads
    if problem := _start_servers(settings, config, api, health):
        return _complain(1, problem)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if settings.leader_election:
        lead(settings, api, health, stop)
    else:
        work(settings, api, health, stop)
    return 0


def lead(settings: Settings, api: Api, health: Health, stop: threading.Event) -> None:
    """Stand by until this replica holds the Lease, then work while it holds it."""
    identity = settings.lease_identity or f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    lease = LeaseClient(api, settings.lease_namespace, settings.lease_name)
    leadership = Leadership(lease, identity, settings.lease_seconds, lost=_end_at_once)
    api.time_left = leadership.time_left
    health.watch(lambda: filter(None, [leadership.problem()]))
    health.not_ready = None  # a standby replica is ready
    if leadership.acquire(stop):
        health.not_ready = "starting"
        if work(settings, api, health, stop):
            leadership.release()


def work(settings: Settings, api: Api, health: Health, stop: threading.Event) -> bool:
    """Serve until the process is told to stop; True when no thread is left that might still write."""
    controller = Controller(settings, api)
    health.watch(controller.problems)
    memo = kopf.Memo(settings=settings, api=api, controller=controller, health=health, stop=stop, idle=False)
    kopf.run(
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        standalone=True,
        memo=memo,
    )
    return bool(memo.idle)


def _start_servers(settings: Settings, config: OperatorConfig, api: Api, health: Health) -> str | None:
    """Start the servers of metrics, probes and webhook; returns the problem of the first that cannot start."""

    def tls() -> Callable[[], ssl.SSLContext]:
        return _webhook_tls(settings, api, health)

    known = webhook.Known(
        config.policy,
        config.gpu_memory,
        partial(namespace_defaults.read, api),
        config.defaults.to_yaml(),
        config.network_profiles,
        config.pod_settings,
    )
    for name, serve in (
        ("metrics_port", lambda port: metrics_server.serve(port, settings.metrics_secret)),
        ("liveness_port", health.serve),
        ("webhook_port", lambda port: webhook.serve(port, tls(), known)),
    ):
        port = getattr(settings, name)
        try:
            if port is not None:
                serve(port)
        except OSError as error:
            return f"{variable(name)}: port {port}: {error}"
    return None


def _webhook_tls(settings: Settings, api: Api, health: Health) -> Callable[[], ssl.SSLContext]:
    """A function that gives the webhook's TLS context, from a folder or from the operator's own certificate.

    Raises OSError when the folder has no certificate.
    """
    if settings.webhook_secret is None:
        return TlsFolder(settings.webhook_certificates).context
    namespace = settings.lease_namespace
    objects = WebhookObjects(api, namespace, settings.webhook_secret, settings.webhook_configuration)
    keeper = CertificateKeeper(objects, f"{settings.webhook_service}.{namespace}.svc")
    keeper.start()
    health.watch(lambda: filter(None, [keeper.problem()]))
    health.require(keeper.not_ready)
    return keeper.context


def _end_at_once(why: str) -> None:
    """Exit without cleanup: other threads would keep writing for a moment, but a dead process cannot write."""
    logging.getLogger(__name__).error("lost the Lease (%s); exiting so that another replica can lead", why)
    logging.shutdown()
    os._exit(3)


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
