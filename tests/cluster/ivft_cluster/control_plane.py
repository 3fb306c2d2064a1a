"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler: their flags, start and readiness."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ivft_cluster import audit, daemons
from ivft_cluster.pki import ADMIN_GROUP, SERVICE_NAMES, Authority
from ivft_cluster.releases import binary
from ivft_cluster.shell import tail, wait_for

SERVICE_CIDR = "10.96.0.0/16"
KUBERNETES_SERVICE_IP = "10.96.0.1"
NO_PORT = "--secure-port=0"  # several clusters share one machine
CLIENTS = {
    "admin": ("admin", ADMIN_GROUP),
    "kube-controller-manager": ("system:kube-controller-manager", None),
    "kube-scheduler": ("system:kube-scheduler", None),
    "kube-proxy": ("system:kube-proxy", None),
    "kubelet-client": ("kube-apiserver-kubelet-client", ADMIN_GROUP),
    "front-proxy": ("front-proxy-client", None),
}


@dataclass(frozen=True)
class ControlPlane:
    """Runs in `state`, as members `<id>/etcd` and so on; `netns` is the command prefix that enters its network."""

    id: str
    state: Path
    address: str = "127.0.0.1"
    port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380
    netns: tuple[str, ...] = ()
    die_with_parent: bool = False
    disabled_admission: Sequence[str] = field(default=())

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def audit_log(self) -> Path:
        """One JSON event a line, for each request of a service account; see `audit`."""
        return self.log("audit")

    def issue_certificates(self, more_hosts: Iterable[str] = ()) -> Authority:
        authority = Authority.create(self.pki)
        hosts = {"localhost", "127.0.0.1", KUBERNETES_SERVICE_IP, self.address, *SERVICE_NAMES, *more_hosts}
        authority.issue("apiserver", "kube-apiserver", hosts=sorted(hosts))
        for name, (common_name, group) in CLIENTS.items():
            authority.issue(name, common_name, group)
            authority.kubeconfig(name, self.server)
        authority.service_account_key()
        return authority

    def start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_peer_port}"
        self._start(
            "etcd",
            f"--data-dir={self.state / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",  # the data die with the cluster; fsync on a shared disk would slow every write
        )

    def start_apiserver(self) -> None:
        pki = self.pki
        flags = [
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--bind-address={'127.0.0.1' if self.address == '127.0.0.1' else '0.0.0.0'}",
            f"--advertise-address={self.address}",
            f"--secure-port={self.port}",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--client-ca-file={pki}/ca.crt",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            f"--kubelet-client-certificate={pki}/kubelet-client.crt",
            f"--kubelet-client-key={pki}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP,Hostname",
            f"--requestheader-client-ca-file={pki}/ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={pki}/front-proxy.crt",
            f"--proxy-client-key-file={pki}/front-proxy.key",
            f"--service-account-key-file={pki}/service-account.pub",
            f"--service-account-signing-key-file={pki}/service-account.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            "--enable-aggregator-routing=true",  # no kube-proxy beside the API server: webhooks go to pod addresses
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
        ]
        if self.address == "127.0.0.1":
            flags.append("--endpoint-reconciler-type=none")  # loopback may not be an endpoint of the Service kubernetes
        if self.disabled_admission:
            flags.append(f"--disable-admission-plugins={','.join(self.disabled_admission)}")
        policy = self.state / "audit-policy.yaml"
        policy.write_text(audit.POLICY, encoding="utf-8")
        flags += [f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}"]
        audit.remember(self.audit_log)
        self._start("kube-apiserver", *flags)

    def start_controller_manager(self, controllers: Iterable[str] = ("*",)) -> None:
        pki = self.pki
        self._start(
            "kube-controller-manager",
            *self._kubeconfigs("kube-controller-manager"),
            f"--controllers={','.join(controllers)}",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={pki}/service-account.key",
            f"--root-ca-file={pki}/ca.crt",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            NO_PORT,
        )

    def start_scheduler(self) -> None:
        self._start("kube-scheduler", *self._kubeconfigs("kube-scheduler"), NO_PORT)

    def ready(self, server: str) -> bool:
        """One request to /readyz with the admin certificate; any failure is an exception of urllib's."""
        context = ssl.create_default_context(cafile=self.pki / "ca.crt")
        context.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        with urllib.request.urlopen(f"{server}/readyz", context=context, timeout=2) as answer:
            return bool(answer.status == 200)

    def wait_ready(self, server: str) -> None:
        """Wait for `server`, which is where this process reaches the API server."""
        wait_for(
            "kube-apiserver is ready",
            lambda: self.ready(server),
            timeout=120,
            on_timeout=lambda: tail(self.log("kube-apiserver")),
        )

    def log(self, name: str) -> Path:
        return self.state / "logs" / f"{name}.log"

    def _kubeconfigs(self, name: str) -> list[str]:
        path = self.pki / f"{name}.kubeconfig"
        return [
            f"--{flag}={path}" for flag in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
        ] + ["--leader-elect=false"]

    def _start(self, name: str, *flags: str) -> None:
        daemons.start(
            f"{self.id}/{name}",
            [*self.netns, binary(name), *flags],
            self.log(name),
            die_with_parent=self.die_with_parent,
        )
