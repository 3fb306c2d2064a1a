"""Which names exist in the cluster, and what they stand for."""

from __future__ import annotations

import pytest
from ivft_cluster.dns_server import Records, Slice

RECORDS = Records()
RECORDS.services = {("ns", "web"): "10.96.0.7", ("ns", "group"): "None", ("ns", "outside"): ""}
RECORDS.slices = {
    ("ns", "web-x1"): Slice(("ns", "web"), [(None, "10.244.1.2")]),
    ("ns", "group-x1"): Slice(("ns", "group"), [("worker-0", "10.244.1.3")]),
    ("ns", "group-x2"): Slice(("ns", "group"), [("worker-1", "10.244.2.3")]),
}


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        pytest.param("web.ns.svc.cluster.local.", ["10.96.0.7"], id="service"),
        pytest.param("WEB.ns.svc.Cluster.local", ["10.96.0.7"], id="any-case"),
        pytest.param("group.ns.svc.cluster.local", ["10.244.1.3", "10.244.2.3"], id="headless-service"),
        pytest.param("worker-1.group.ns.svc.cluster.local", ["10.244.2.3"], id="pod-behind-headless-service"),
        pytest.param("worker-2.group.ns.svc.cluster.local", None, id="pod-without-address-yet"),
        pytest.param("outside.ns.svc.cluster.local", [], id="service-without-endpoints"),
        pytest.param("web.other.svc.cluster.local", None, id="another-namespace"),
        pytest.param("ns.svc.cluster.local", None, id="namespace"),
        pytest.param("cluster.local", None, id="zone"),
        pytest.param("example.com", None, id="the-internet"),
    ],
)
def test_lookup(name: str, addresses: list[str] | None) -> None:
    assert RECORDS.lookup(name) == addresses
