"""The defaults of namespaces: the key `defaults.yaml` of the ConfigMap `internvl-defaults`.

The controller keeps those of all namespaces in a cache; the webhook, which every replica serves, asks for one.
"""

from typing import Any

from internvl_api.validation.defaults import CONFIG_MAP, KEY, MAX_TEXT

from internvl_operator.core.run import Key
from internvl_operator.kube.cache import Collection
from internvl_operator.kube.client import Api
from internvl_operator.kube.informer import Choice

_TIMEOUT = 2.0  # seconds; an API server waits ten for a webhook

Raw = dict[str, Any]


def _text(raw: Raw) -> str | None:
    """What the key holds, with one character too many when it is too long; None without the key."""
    text = (raw.get("data") or {}).get(KEY)
    return text[: MAX_TEXT + 1] if isinstance(text, str) else None


def _small(raw: Raw) -> Raw:
    """A copy with nothing but the defaults: a ConfigMap may hold a megabyte."""
    named = {key: raw["metadata"].get(key, "") for key in ("namespace", "name", "resourceVersion")}
    text = _text(raw)
    return {"metadata": named, "data": {} if text is None else {KEY: text}}


CHOICE = Choice(fields=f"metadata.name={CONFIG_MAP}", keep=_small)


class NamespaceDefaults(Collection[str]):
    """The text of each namespace's defaults."""

    def __init__(self) -> None:
        super().__init__(_text, lambda raw: raw["metadata"]["name"] if raw["metadata"]["name"] == CONFIG_MAP else None)

    def text(self, namespace: str) -> str:
        """The defaults of a namespace; "" without any."""
        return self.get(Key(namespace, CONFIG_MAP)) or ""


def read(api: Api, namespace: str) -> str:
    """The defaults of one namespace from the API server; "" without any. Raises ApiError."""
    return _text(api.find("ConfigMap", namespace, CONFIG_MAP, _TIMEOUT) or {}) or ""
