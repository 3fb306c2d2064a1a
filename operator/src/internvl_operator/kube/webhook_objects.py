"""Read and write the two objects of the webhook's certificate: one Secret and one ValidatingWebhookConfiguration."""

import base64
import binascii
from typing import Any, NamedTuple

from internvl_operator.certificates import Served
from internvl_operator.kube.client import Api, object_path

Raw = dict[str, Any]
_KEYS = ("ca.crt", "tls.crt", "tls.key")  # in the order of Served
_CONFIGURATION = "ValidatingWebhookConfiguration"


class Stored(NamedTuple):
    """The content of the Secret, and the object that it was read from."""

    served: Served
    raw: Raw


class WebhookObjects:
    """The two objects by name. Every write needs the lead. Raises ApiError."""

    def __init__(self, api: Api, namespace: str, secret: str, configuration: str) -> None:
        self._api = api
        self._secret = object_path("Secret", namespace, secret)
        self._name = configuration

    def may_write(self) -> bool:
        """Whether this replica leads."""
        return self._api.time_left() > 0

    def read(self) -> Stored:
        """The Secret; absent or unreadable entries are empty."""
        raw: Raw = {"apiVersion": "v1", "kind": "Secret"} | self._api.get(self._secret)
        data: Raw = raw.get("data") or {}
        return Stored(Served(*(_decoded(data.get(key)) for key in _KEYS)), raw)

    def write(self, before: Stored, served: Served) -> Stored:
        """Replace the content of the Secret; 409 when it has changed since it was read."""
        content = {key: _encoded(value) for key, value in zip(_KEYS, served, strict=True)}
        data = (before.raw.get("data") or {}) | content
        return Stored(served, self._api.replace(before.raw | {"data": data}))

    def trust(self, authorities: bytes) -> str | None:
        """Make API servers trust these CAs for every webhook; returns the problem when it cannot, else None."""
        found = self._api.find(_CONFIGURATION, None, self._name)
        if found is None:
            problem = f"{_CONFIGURATION} {self._name!r} does not exist, so API servers do not call the webhook"
            return f"{problem}; restore it with `helm upgrade`"
        client_config = {"caBundle": _encoded(authorities)}
        hooks = found.get("webhooks") or []
        if any(hook["clientConfig"].get("caBundle") != client_config["caBundle"] for hook in hooks):
            change = {
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": _CONFIGURATION,
                "metadata": {"name": self._name},
                "webhooks": [{"name": hook["name"], "clientConfig": client_config} for hook in hooks],
            }
            self._api.apply(change, force=True)  # force: Helm may have written an older caBundle
        return None


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _decoded(value: object) -> bytes:
    try:
        return base64.b64decode(value) if isinstance(value, str) else b""
    except binascii.Error:
        return b""
