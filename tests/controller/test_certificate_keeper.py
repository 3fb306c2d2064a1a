"""The webhook's certificate: made once, renewed in time, and never served before API servers trust it."""

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from internvl_operator import webhook
from internvl_operator.certificate_keeper import CertificateKeeper
from internvl_operator.certificates import LIFETIME, Served, issue, trusted, unusable
from internvl_operator.clock import utc_now
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.webhook_objects import Stored

HOST = "internvl-operator-webhook.internvl-system.svc"
START = datetime(2026, 1, 31, 12, tzinfo=UTC)
EMPTY = Served(b"", b"", b"")
REVIEW = json.dumps({"apiVersion": "admission.k8s.io/v1", "request": {"uid": "7"}})


class Cluster:
    """The Secret and the bundle of the API servers, shared by the replicas; records each change in order."""

    def __init__(self) -> None:
        self.secret, self.bundle, self.version = EMPTY, b"", 0
        self.changes: list[str] = []
        self.configured = True
        self.broken: ApiError | None = None


class Replica:
    """What one replica may do to the cluster."""

    def __init__(self, cluster: Cluster, leads: bool) -> None:
        self.cluster, self.leads = cluster, leads

    def may_write(self) -> bool:
        return self.leads

    def read(self) -> Stored:
        if self.cluster.broken:
            raise self.cluster.broken
        return Stored(self.cluster.secret, {"version": self.cluster.version})

    def write(self, before: Stored, served: Served) -> Stored:
        assert self.leads
        if before.raw["version"] != self.cluster.version:
            raise ApiError(409, "Conflict", "changed")
        self.cluster.version += 1
        self.cluster.secret = served
        self.cluster.changes.append("secret")
        return self.read()

    def trust(self, authorities: bytes) -> str | None:
        assert self.leads
        if self.cluster.bundle != authorities:
            self.cluster.changes.append("bundle")
            self.cluster.bundle = authorities
        return None if self.cluster.configured else "no configuration"


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **span: float) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


Make = Callable[..., CertificateKeeper]


@pytest.fixture
def replica(cluster: Cluster, clock: Clock) -> Make:
    return lambda leads=True: CertificateKeeper(Replica(cluster, leads), HOST, clock)


def authorities(bundle: bytes) -> int:
    return bundle.count(b"BEGIN CERTIFICATE")


def accepted(cluster: Cluster, served: Served, clock: Clock) -> bool:
    """Whether API servers accept what a replica serves."""
    return unusable(served._replace(authorities=cluster.bundle), HOST, clock.now) is None


def test_a_new_certificate_is_for_the_service_and_lives_ninety_days() -> None:
    made = issue(HOST, START)
    certificate, authority = (x509.load_pem_x509_certificate(each) for each in (made.certificate, made.authorities))
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST]
    assert certificate.not_valid_after_utc == START + timedelta(days=90)
    assert made.authorities != issue(HOST, START).authorities


def test_the_leader_makes_the_first_certificate_and_standbys_serve_it(cluster: Cluster, replica: Make) -> None:
    leader, standby = replica(), replica(leads=False)
    assert standby.check() == ["there is no certificate yet"]
    assert standby.not_ready() == "the webhook has no certificate yet; there is no certificate yet"
    with pytest.raises(OSError, match="no certificate"):
        standby.context()
    assert leader.check() == []
    assert cluster.changes == ["bundle", "secret"], "API servers trust it before it is served"
    assert cluster.secret.authorities == cluster.bundle
    assert standby.check() == []
    assert leader.not_ready() is standby.not_ready() is None
    leader.check()
    assert cluster.changes == ["bundle", "secret"], "a pass with nothing to do writes nothing"


def test_renewal_keeps_the_old_authority_and_serves_the_new_certificate_only_once_it_is_trusted(
    cluster: Cluster, clock: Clock, replica: Make
) -> None:
    leader, standby = replica(), replica(leads=False)
    leader.check()
    standby.check()
    first, served = cluster.secret, standby.context()
    clock.advance(days=59)
    leader.check()
    assert cluster.secret == first
    clock.advance(days=1)
    leader.check()
    assert cluster.secret == first, "still served"
    assert authorities(cluster.bundle) == 2
    assert accepted(cluster, first, clock)
    clock.advance(seconds=59)
    leader.check()
    assert cluster.secret == first
    clock.advance(seconds=1)
    leader.check()
    second = cluster.secret
    assert second.certificate != first.certificate
    assert accepted(cluster, first, clock), "what a standby still serves"
    assert accepted(cluster, second, clock)
    assert cluster.changes == ["bundle", "secret"] * 2
    standby.check()
    assert standby.context() is not served, "reloaded without a restart"
    clock.advance(days=29)
    leader.check()
    assert authorities(cluster.bundle) == 2
    clock.advance(days=2)
    leader.check()
    assert authorities(cluster.bundle) == 1, "an expired authority is removed"
    assert accepted(cluster, second, clock)


def test_a_leader_that_dies_during_renewal_leaves_a_served_certificate_that_is_trusted(
    cluster: Cluster, clock: Clock, replica: Make
) -> None:
    replica().check()
    first = cluster.secret
    clock.advance(days=60)
    replica().check()  # and it dies with the new certificate
    successor = replica()
    successor.check()
    assert accepted(cluster, first, clock)
    clock.advance(seconds=60)
    successor.check()
    assert cluster.secret != first
    assert accepted(cluster, cluster.secret, clock)
    assert authorities(cluster.bundle) == 2, "the authority of the leader that died is forgotten"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda served: served._replace(certificate=b"words"), "cannot be read", id="unreadable"),
        pytest.param(lambda served: served._replace(key=b""), "no certificate yet", id="no-key"),
        pytest.param(lambda served: served._replace(key=issue(HOST, START).key), "another", id="foreign-key"),
        pytest.param(lambda served: issue("other.svc", START), f"not for {HOST}", id="another-name"),
        pytest.param(lambda served: issue(HOST, START - LIFETIME), "to 2026-01-31", id="expired"),
        pytest.param(
            lambda served: served._replace(authorities=issue(HOST, START).authorities), "authority", id="foreign-ca"
        ),
    ],
)
def test_an_unusable_certificate_is_named_and_replaced_at_once(
    cluster: Cluster, clock: Clock, replica: Make, spoil: Callable[[Served], Served], why: str
) -> None:
    cluster.secret = spoil(issue(HOST, START))
    (found,) = replica(leads=False).check()
    assert why in found
    assert replica().check() == []
    assert accepted(cluster, cluster.secret, clock)


def test_a_lost_secret_costs_no_request(cluster: Cluster, clock: Clock, replica: Make) -> None:
    leader = replica()
    leader.check()
    served = leader.context()
    cluster.broken = ApiError(404, "NotFound", 'secrets "certificate" not found')
    assert leader.check() == ['404 NotFound: secrets "certificate" not found']
    assert leader.context() is served
    cluster.broken = None
    assert leader.check() == []


def test_a_lost_configuration_does_not_stop_the_certificate(cluster: Cluster, replica: Make) -> None:
    cluster.configured = False
    leader = replica()
    (found,) = leader.check()
    assert found == "no configuration"
    assert leader.not_ready() is None


def test_a_bundle_has_each_authority_once_and_none_that_cannot_be_read() -> None:
    one, two = issue(HOST, START).authorities, issue(HOST, START).authorities
    assert trusted(START, one, b"words", two + one, b"") == one + two


@pytest.fixture
def served(cluster: Cluster) -> Iterator[int]:
    """Port of a webhook with the certificate of a keeper."""
    keeper = CertificateKeeper(Replica(cluster, leads=True), HOST, utc_now)
    server = webhook.serve(0, keeper.context)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server.server_port, ssl._create_unverified_context())  # no certificate yet
    keeper.check()
    yield server.server_port
    server.shutdown()
    server.server_close()


def handshake(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=30), server_hostname=HOST)


def test_a_client_that_knows_the_bundle_and_the_service_talks_to_the_webhook(cluster: Cluster, served: int) -> None:
    strict = ssl.create_default_context(cadata=cluster.bundle.decode())
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    connection = http.client.HTTPConnection(HOST)
    connection.sock = handshake(served, strict)
    connection.request("POST", webhook.PATH, REVIEW)
    assert json.loads(connection.getresponse().read())["response"] == {"uid": "7", "allowed": True}
    connection.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(served, ssl.create_default_context(cadata=issue(HOST, utc_now()).authorities.decode()))
