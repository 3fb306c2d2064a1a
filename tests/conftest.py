"""Fixtures every test may ask for: a real API server, a real object store, a real cluster (see tests/cluster)."""

import os

import hypothesis
import pytest
from ivft_cluster import audit, releases
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd
from ivft_cluster.releases import CONTAINERD, ETCD

# The processes of a test and the lanes of `make test` share two cores. With more OpenMP threads than cores, threads
# burn CPU time while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["ivft_cluster.fixtures"]

# The same examples on every machine, however busy it is.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the rights that operators used on every server in the cache; fail when one was missing."""
    if rights := audit.rights():
        session.config.cache.set("operator/rights", sorted(rights))  # type: ignore[union-attr]
    if audit.refusals():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which servers the tests ran on, and what RBAC refused to an operator there."""
    if rights := audit.rights():
        terminalreporter.write_line(f"operators used {len(rights)} rights of the chart's on {audit.servers()} servers")
    for line in audit.refusals():
        terminalreporter.write_line(f"a right that the chart does not give: {line}", red=True)
    parts = {"Kubernetes": f"v{releases.release()}", "etcd": ETCD.version, "containerd": CONTAINERD.version}
    terminalreporter.write_line("ran with " + ", ".join(f"{name} {version}" for name, version in parts.items()))


@pytest.fixture(scope="session")
def served(api_server: ApiServer) -> ApiServer:
    """An API server that knows InternVLFineTunes."""
    install_crd(api_server)
    return api_server
