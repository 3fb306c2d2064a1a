"""Settings of a cluster: `up` chooses them, and later commands read them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ivft_cluster.ports import free_ports
from ivft_cluster.s3 import Credentials


@dataclass(frozen=True)
class Settings:
    """Stored in `<state>/cluster.json` (mode 0600); the gateways are ports on loopback."""

    nodes: int
    s3: Credentials
    api_gateway: int
    s3_gateway: int
    prometheus_gateway: int

    @classmethod
    def make(cls, nodes: int) -> Settings:
        return cls(nodes, Credentials.make(), *free_ports(3))

    @classmethod
    def load(cls, path: Path) -> Settings:
        fields = json.loads(path.read_text())
        return cls(**{**fields, "s3": Credentials(**fields["s3"])})

    def save(self, path: Path) -> None:
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self), indent=2))
