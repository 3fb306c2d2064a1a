"""What the object stores share: keys below an address, checks of content, and failures in the user's words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import requests
from requests.adapters import HTTPAdapter

from internvl_trainer.artifacts.ranges import check_length
from internvl_trainer.artifacts.storage import Storage, StoredFile, Tagged, inside, unless_absent
from internvl_trainer.errors import AccessDenied, Unavailable, UserError

Result = TypeVar("Result")
CONNECTIONS = 32  # of one process to one store
PART = 32 << 20  # bytes of a part of a large upload
SHA256 = "sha256"  # the metadata with a file's digest in hex


class Service(NamedTuple):
    """What messages say about one kind of object store.

    Attributes:
        scheme: with which its addresses begin.
        container: what its users call a bucket.
        keys: of the Secret with credentials.
        rights: what refuses valid credentials.
        endpoint: what sets the server's address.
    """

    scheme: str
    container: str
    keys: str
    rights: str
    endpoint: str


class Head(NamedTuple):
    """What a server tells about a file without its content.

    Attributes:
        modified: seconds of the server's clock.
        recorded: the sha256 in hex that the writer stored with it.
        sha256: the server's own digest of the content in hex, where it has one.
        checksum: the server's own; files of equal size with the same checksum have the same content.
        copied: the etag of the file that the server has copied it from.
    """

    size: int
    etag: str
    modified: float
    recorded: str | None = None
    sha256: str | None = None
    checksum: str | None = None
    copied: str | None = None

    def equals(self, origin: Head) -> bool:
        """Whether the server knows that this file's content is that of `origin`."""
        same = self.checksum is not None and self.checksum == origin.checksum
        return self.size == origin.size and (same or self.copied == origin.etag)


class CredentialsError(Exception):
    """There are no credentials, or none that a client can be made of."""


class ObjectStorage(Storage, ABC):
    """Keys under SCHEME://bucket/prefix: a Storage and a RangeSource."""

    service: ClassVar[Service]
    errors: ClassVar[tuple[type[Exception], ...]]  # of the client

    def __init__(self, uri: str, *, field: str) -> None:
        self.uri, self._field = uri.rstrip("/"), field
        self._bucket, _, self._prefix = uri.removeprefix(self.service.scheme).rstrip("/").partition("/")
        if not self._bucket:
            scheme, container = self.service.scheme, self.service.container
            raise UserError(
                "UnsupportedSource",
                f"found {uri!r}, which names no {container}; expected {scheme}{container}/prefix",
                field,
            )
        self._root = f"{self._prefix}/" if self._prefix else ""

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        files = self._call(prefix, lambda client: self._list(client, self._root + prefix))
        while (file := self._call(prefix, lambda _: next(files, None))) is not None:
            yield file._replace(key=file.key.removeprefix(self._root))

    def stat(self, key: str) -> StoredFile | None:
        head = self._head_of(key)
        return StoredFile(key, head.size, head.etag) if head else None

    def modified(self, key: str) -> float:
        return self._call(key, lambda client: self._head(client, self._key(key))).modified

    def read_tagged(self, key: str) -> Tagged | None:
        return unless_absent(lambda: self._call(key, lambda client: self._get_tagged(client, self._key(key))))

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        tag = self._call(key, lambda client: self._put_if(client, self._key(key), data, expected))
        if tag is not None:
            return tag
        found = self.read_tagged(key)  # the client may have sent the request twice: the first was stored
        return found.tag if found and found.data == data else None

    def read_range(self, file: StoredFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of this version of a file; see RangeSource."""
        data = self._call(file.key, lambda client: self._get_range(client, file, start, end))
        check_length(f"{self.uri}/{file.key}", data, end - start)
        return data

    def has_content(self, key: str, size: int, sha256: str, *, like: str | None = None) -> bool:
        found = self._head_of(key)
        if found is None or found.size != size:
            return False
        if found.sha256 is not None:
            return found.sha256 == sha256
        origin = self._head_of(like) if like else None
        if origin and origin.recorded == sha256 and found.equals(origin):
            return True
        return self._call(key, lambda client: self._hash(client, self._key(key))) == sha256

    def delete(self, prefix: str) -> None:
        for stored in list(self.list(prefix)):
            key = self._key(stored.key)
            self._call(stored.key, lambda client, key=key: self._delete(client, key))  # type: ignore[misc]

    @abstractmethod
    def _client(self) -> Any:
        """The client of this process. Raises CredentialsError."""

    @abstractmethod
    def _failure(self, error: Any, key: str) -> UserError:
        """The error for one of `errors`."""

    @abstractmethod
    def _list(self, client: Any, prefix: str) -> Iterator[StoredFile]:
        """Files whose whole key starts with `prefix`, in order; their keys are whole."""

    @abstractmethod
    def _head(self, client: Any, key: str) -> Head: ...

    @abstractmethod
    def _get_tagged(self, client: Any, key: str) -> Tagged: ...

    @abstractmethod
    def _put_if(self, client: Any, key: str, data: bytes, expected: str | None) -> str | None:
        """See `replace`."""

    @abstractmethod
    def _get_range(self, client: Any, file: StoredFile, start: int, end: int) -> bytes:
        """See `read_range`."""

    @abstractmethod
    def _hash(self, client: Any, key: str) -> str:
        """The sha256 of a file's content in hex, which is read."""

    @abstractmethod
    def _delete(self, client: Any, key: str) -> None: ...

    def _head_of(self, key: str) -> Head | None:
        return unless_absent(lambda: self._call(key, lambda client: self._head(client, self._key(key))))

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self._prefix, inside(key, field=self._field)) if part)

    def _place(self, key: str) -> str:
        return f"{self.service.scheme}{self._bucket}/{self._key(key)}"

    def _call(self, key: str, call: Callable[[Any], Result]) -> Result:
        try:
            return call(self._client())
        except CredentialsError as error:
            raise self._no_credentials(key, str(error)) from error
        except self.errors as error:
            raise self._failure(error, key) from error

    def _no_bucket(self, key: str) -> UserError:
        container = self.service.container
        return UserError(
            "NoSuchBucket", f"found no {container} {self._bucket!r} for {self._place(key)}; make it", self._field
        )

    def _not_found(self, key: str) -> UserError:
        return UserError("NotFound", f"found no object {self._place(key)}; check the URI", self._field)

    def _denied(self, key: str, why: str) -> UserError:
        return AccessDenied(
            "AccessDenied",
            f"{self._place(key)} was refused ({why}); check {self.service.keys} of the Secret "
            f"spec.secrets.objectStorage, and {self.service.rights}",
            self._field,
        )

    def _no_credentials(self, key: str, why: str) -> UserError:
        return AccessDenied(
            "CredentialsMissing",
            f"{self._place(key)}: {why}; name a Secret with {self.service.keys} in spec.secrets.objectStorage, or a "
            "ServiceAccount with a workload identity in spec.podTemplate.serviceAccountName",
            self._field,
        )

    def _refused(self, key: str, why: str) -> UserError:
        """The error for an answer of the server that says nothing about the user's input."""
        return Unavailable("StorageUnavailable", f"{self._place(key)}: {why}", self._field)

    def _unreachable(self, key: str, why: object) -> UserError:
        return Unavailable(
            "StorageUnavailable",
            f"{self._place(key)}: {why}; check {self.service.endpoint} and that the server runs",
            self._field,
        )


def widen(session: requests.Session) -> requests.Session:
    """Let a session keep as many connections as the threads of a process use."""
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_connections=CONNECTIONS, pool_maxsize=CONNECTIONS))
    return session
