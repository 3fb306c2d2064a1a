"""Fixtures of the benchmarks: the same API server and operator process as the integration tests."""

from controller.conftest import cluster_of_test, kubelet, operator

__all__ = ["cluster_of_test", "kubelet", "operator"]
