"""Addresses of inputs, and their redaction: what is printed or stored never holds a password or a signature.

`Address` is text with the secret parts left out; only `reveal()` gives the whole address, for a request. A missing
`reveal()` fails in a request; a missing redaction is not possible.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, SerializationInfo

WHOLE = {"addresses": "whole"}
"""Serialisation context that keeps whole addresses: for the run.yaml that a stage reads."""

IDENTIFIED = {"addresses": "identified"}
"""Serialisation context that adds a digest of the whole address where a part is hidden: to compare configurations."""

OBJECT_STORES = ("s3://", "gs://", "az://")
"""Schemes of the object stores that a run reads from and writes to."""

HIDDEN = "…"
# The scheme of an address within a text; what follows it, up to white space or a quote, is the address.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,20}://)", re.IGNORECASE)
_END = re.compile(r"[\s\"'<>`]")
_SECRET_PART = re.compile(r"[?#;]")  # where the query, the fragment or the path parameters begin
_AT_REVISION = ("hf://", "pvc://")  # an @ in these begins a revision
_WEB = ("http://", "https://", "ftp://", "ftps://", "ws://", "wss://")


class Address(str):
    """An address whose text has no user name, password, query or fragment; `reveal()` has them.

    Two addresses are equal when they are equal as a whole.
    """

    __slots__ = ("_whole",)
    _whole: str

    def __new__(cls, text: str) -> Address:
        """The address of `text`, which may be an Address."""
        whole = text.reveal() if isinstance(text, Address) else text
        made = super().__new__(cls, redact_address(whole))
        made._whole = whole
        return made

    def reveal(self) -> str:
        """The whole address, for the request alone."""
        return self._whole

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._whole == reveal(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._whole)

    def __getnewargs__(self) -> tuple[str]:
        return (self._whole,)


def reveal(text: str) -> str:
    """The whole address of an Address; any other text as it is."""
    return text.reveal() if isinstance(text, Address) else text


def has_credentials(text: str) -> bool:
    """Whether an address holds a user name, a password or a key before its host or bucket."""
    scheme, found, rest = text.partition("://")
    if not found:
        return False
    return _without_user(f"{scheme.lower()}://", rest) != rest


def refuse_credentials(text: str) -> str:
    """`text`, or ValueError for an address with a user name or a password."""
    if has_credentials(text):
        raise ValueError(credentials_message(text))
    return text


def credentials_message(text: str) -> str:
    """The message about credentials in an address, and where they belong; it shows none of them."""
    return (
        f"found a user name or a password in {redact_address(text)}; an address is stored and shown, so remove them. "
        "Keys of object storage belong in secrets.objectStorage; for a signed https:// URL write ?$(SOURCE_NAME) as "
        "its query, and set the variable SOURCE_NAME in podTemplate.env from a Secret"
    )


def redact_address(text: str) -> str:
    """One address without its secret parts."""
    found = _SCHEME.match(text)
    return _redact_one(found[0], text[found.end() :])[0] if found else text


def redact(text: str) -> str:
    """Any text with the secret parts of all addresses left out, in time proportional to its length.

    >>> redact("HTTPS://me:pw@data.example/x.jsonl?X-Amz-Signature=abc and s3://KEY:SECRET@bucket/key")
    'HTTPS://data.example/x.jsonl?… and s3://bucket/key'
    """
    first, *pieces = _SCHEME.split(text)
    shown, hiding = [first], False
    for scheme, piece in zip(pieces[::2], pieces[1::2], strict=True):
        end = _END.search(piece)
        address, rest = (piece[: end.start()], piece[end.start() :]) if end else (piece, "")
        if not hiding:  # else this address is part of the query of the one before
            kept, hiding = _redact_one(scheme, address)
            shown.append(kept)
        if end:
            shown.append(rest)
            hiding = False
    return "".join(shown)


def _redact_one(scheme: str, rest: str) -> tuple[str, bool]:
    """What to show of an address, and whether its end was left out."""
    rest = _without_user(scheme.lower(), rest)
    if scheme.lower().endswith(_WEB) and (secret := _SECRET_PART.search(rest)):
        return f"{scheme}{rest[: secret.start()]}{rest[secret.start()]}{HIDDEN}", True
    return f"{scheme}{rest}", False


def _without_user(scheme: str, rest: str) -> str:
    """The part after the scheme without `user:password@`; a password may hold a slash."""
    if scheme.endswith(_AT_REVISION):
        return rest
    authority = re.split(r"[/?#;]", rest, maxsplit=1)[0]
    known = scheme.endswith((*_WEB, *OBJECT_STORES))
    if not known and ":" not in rest.partition("@")[0]:  # a user without a password, as in ssh://git@host
        return rest
    if "@" in authority:
        return rest[authority.rindex("@") + 1 :]
    _, colon, port = authority.partition(":")
    if colon and not port.isdigit() and not authority.startswith("["):  # the rest of a password follows a slash
        return rest.rpartition("@")[2] if "@" in rest else HIDDEN if known else rest
    return rest


def _hold(text: str) -> Address:
    return Address(refuse_credentials(text))


def _serialise(value: str, info: SerializationInfo) -> str:
    form = info.context.get("addresses") if isinstance(info.context, dict) else None
    whole, shown = reveal(value), redact_address(reveal(value))
    if form == "whole":
        return whole
    if form == "identified" and whole != shown:
        return f"{shown} (sha256 {hashlib.sha256(whole.encode()).hexdigest()[:16]})"
    return shown


OPEN = BeforeValidator(reveal)
HOLD = AfterValidator(_hold)
SHOW = PlainSerializer(_serialise, when_used="json")
Addressed = Annotated[str, HOLD, OPEN, SHOW]
"""Field type: validated as text, held as an Address, serialised without its secret parts (see WHOLE, IDENTIFIED)."""
