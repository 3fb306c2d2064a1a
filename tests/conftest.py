"""Fixtures every test may ask for: a real API server, a real object store, a real cluster (see tests/cluster)."""

pytest_plugins = ["ivft_cluster.fixtures"]
