"""The cluster's DNS: A records of Services and of pods behind headless Services; everything else does not exist.

Run as `python -m ivft_cluster.dns_server <kubeconfig> <address>`. Answers follow a watch of Services and
EndpointSlices: a pod's name resolves once its address is ready in a slice (at once, with publishNotReadyAddresses).
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

from dnslib import QTYPE, RCODE, RR, A
from dnslib.server import BaseResolver, DNSLogger, DNSServer
from kubernetes import client, config

from ivft_cluster.watching import Key, follow

ZONE = ("svc", "cluster", "local")
SERVICE_NAME = "kubernetes.io/service-name"  # label of an EndpointSlice


class Slice(NamedTuple):
    """An EndpointSlice's (namespace, service), and the (hostname, address) pairs of its ready endpoints."""

    service: Key
    addresses: list[tuple[str | None, str]]


class Records(BaseResolver):  # type: ignore[misc]
    """The cluster address of each (namespace, service), and what each EndpointSlice (namespace, name) holds."""

    def __init__(self) -> None:
        self.services: dict[Key, str] = {}
        self.slices: dict[Key, Slice] = {}

    def lookup(self, name: str) -> list[str] | None:
        """Addresses of `name`, or None when there is no such name."""
        *labels, a, b, c = ("." * 3 + name.lower().rstrip(".")).split(".")
        labels = [label for label in labels if label]
        if (a, b, c) != ZONE or len(labels) not in (2, 3):
            return None
        key = (labels[-1], labels[-2])
        if key not in self.services:
            return None
        behind = [pair for each in list(self.slices.values()) if each.service == key for pair in each.addresses]
        if len(labels) == 3:
            return [address for hostname, address in behind if hostname == labels[0]] or None
        if (address := self.services[key]) not in ("", "None"):
            return [address]
        return [address for _, address in behind]

    def resolve(self, request: Any, handler: Any) -> Any:
        reply = request.reply()
        addresses = self.lookup(str(request.q.qname))
        if addresses is None:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            for address in addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=1))
        return reply


def _slice(item: Any) -> Slice:
    service = (item.metadata.namespace, (item.metadata.labels or {}).get(SERVICE_NAME, ""))
    ready = [each for each in item.endpoints or [] if each.conditions is None or each.conditions.ready is not False]
    return Slice(service, [(each.hostname, address) for each in ready for address in each.addresses])


def main(kubeconfig: str, address: str) -> None:
    api_client = config.new_client_from_config(kubeconfig)  # type: ignore[no-untyped-call]
    api, discovery, records = client.CoreV1Api(api_client), client.DiscoveryV1Api(api_client), Records()
    for listing, store, value in (
        (api.list_service_for_all_namespaces, records.services, lambda service: service.spec.cluster_ip),
        (discovery.list_endpoint_slice_for_all_namespaces, records.slices, _slice),
    ):
        threading.Thread(target=follow, args=(listing, store, value), daemon=True).start()
    servers = [
        DNSServer(records, address=address, port=53, tcp=tcp, logger=DNSLogger("error")) for tcp in (False, True)
    ]
    servers[0].start_thread()
    servers[1].start()


if __name__ == "__main__":
    main(*sys.argv[1:])
