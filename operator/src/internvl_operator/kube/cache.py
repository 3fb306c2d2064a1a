"""Caches of runs and their children, indexed by run; filled by watches and by the answers to our own writes.

Watches and answers report the same objects in any order. Resource versions grow with every change, so the newer object
wins; an answer older than the watch's position is ignored, because the watch may have seen the object deleted. Versions
go back only when somebody restores etcd from a backup; a list that is older than an earlier one shows it.

Raw objects are stored compressed: as Python dictionaries, a few thousand runs would fill a small container.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

from internvl_operator.core.run import Key

T = TypeVar("T")
Raw = dict[str, Any]
Read = Callable[[Raw], T | None]
_DIGEST = "sha256:"
OwnerName = Callable[[Raw], str | None]


class _Entry(NamedTuple):
    version: int
    run: Key
    value: Any


class Collection(Generic[T]):
    """Objects of one kind. `read` converts a raw object for storage; None, or an object without owner, is not ours."""

    def __init__(self, read: Read[T], owner_name: OwnerName) -> None:
        self._read, self._owner_name = read, owner_name
        self._lock = Lock()
        self._entries: dict[Key, _Entry] = {}
        self._by_run: dict[Key, set[Key]] = {}
        self._position = 0

    def seen(self, raw: Raw) -> Key | None:
        """Store a created or changed object. Its run, or None when the object is not newer."""
        with self._lock:
            self._position = max(self._position, version_of(raw))
            return self._put(raw)

    def gone(self, raw: Raw) -> Key | None:
        """Remove a deleted object. Its run, or None when it was unknown."""
        with self._lock:
            self._position = max(self._position, version_of(raw))
            return self._drop(key_of(raw))

    def answered(self, raw: Raw) -> None:
        """Store the answer to a write."""
        with self._lock:
            if key_of(raw) in self._entries or version_of(raw) > self._position:
                self._put(raw)

    def replaced(
        self, raws: Iterable[Raw], position: int, *, within: str | None = None, passed: int = 0, restored: bool = False
    ) -> tuple[set[Key], int]:
        """Replace everything (in namespace `within`) with a new list.

        Returns the runs whose children changed, and the number of changes that the watch had missed: those with a
        version up to `passed`, its position. `restored`: etcd was restored from a backup, so everything cached is
        dropped first.
        """
        with self._lock:
            listed, changed, missed = set(), set(), 0
            if restored:
                gone = [key for key in self._entries if within in (None, key.namespace)]
                changed = {run for key in gone if (run := self._drop(key)) is not None}
                self._position = position
            for raw in raws:
                listed.add(key_of(raw))
                if (run := self._put(raw)) is not None:
                    changed.add(run)
                    missed += version_of(raw) <= passed
            for key, entry in list(self._entries.items()):
                if key not in listed and entry.version <= position and within in (None, key.namespace):
                    self._drop(key)
                    changed.add(entry.run)
            self._position = max(self._position, position)
            return changed, missed

    def of(self, run: Key) -> list[T]:
        """All objects of one run."""
        with self._lock:
            kept = [self._entries[key].value for key in self._by_run.get(run, ())]
        return [self._given(value) for value in kept]

    def get(self, key: Key) -> T | None:
        """One object."""
        with self._lock:
            entry = self._entries.get(key)
        return self._given(entry.value) if entry else None

    def __len__(self) -> int:
        return len(self._entries)

    def _put(self, raw: Raw) -> Key | None:
        key, version = key_of(raw), version_of(raw)
        known = self._entries.get(key)
        if known and known.version >= version:
            return None
        name, value = self._owner_name(raw), self._read(raw)
        if name is None or value is None:
            return self._drop(key)
        run = Key(key.namespace, name)
        if known and known.run != run:
            self._drop(key)
        self._entries[key] = _Entry(version, run, self._kept(value))
        self._by_run.setdefault(run, set()).add(key)
        return run

    def _kept(self, value: T) -> Any:
        """The stored form of a value."""
        return value

    def _given(self, kept: Any) -> T:
        """The value of a stored form."""
        value: T = kept
        return value

    def _drop(self, key: Key) -> Key | None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        siblings = self._by_run[entry.run]
        siblings.discard(key)
        if not siblings:
            del self._by_run[entry.run]
        run: Key = entry.run
        return run


class RawCollection(Collection[Raw]):
    """Raw objects, stored compressed because they are read seldom."""

    def __init__(self, owner_name: OwnerName) -> None:
        super().__init__(slim, owner_name)

    def _kept(self, value: Raw) -> bytes:
        return pack(value)

    def _given(self, kept: bytes) -> Raw:
        return unpack(kept)


class _PackedRun(NamedTuple):
    version: int
    uid: str
    packed: bytes


class RunCache:
    """The custom resources, as last seen by kopf's watch or in the answer to a status write."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._runs: dict[Key, _PackedRun] = {}

    def seen(self, raw: Raw) -> bool:
        """Store a newer state; False when it is not newer."""
        with self._lock:
            known = self._runs.get(key_of(raw))
            if known and known.version >= version_of(raw):  # also of an earlier run of this name
                return False
            self._put(raw)
            return True

    def answered(self, raw: Raw) -> None:
        """Store the answer to a write, unless the run was deleted meanwhile."""
        with self._lock:
            known = self._runs.get(key_of(raw))
            if known and known.uid == raw["metadata"]["uid"] and version_of(raw) > known.version:
                self._put(raw)

    def restored(self, namespace: str | None) -> None:
        """Forget all runs (of one namespace), because etcd was restored from a backup."""
        with self._lock:
            self._runs = {key: run for key, run in self._runs.items() if namespace not in (None, key.namespace)}

    def gone(self, key: Key, uid: str) -> None:
        """Forget a deleted run, unless its name already belongs to a new one."""
        with self._lock:
            if key in self._runs and self._runs[key].uid == uid:
                del self._runs[key]

    def get(self, key: Key) -> Raw | None:
        """A copy of the raw object."""
        with self._lock:
            known = self._runs.get(key)
        return unpack(known.packed) if known else None

    def uids(self) -> dict[Key, str]:
        """Which runs there are."""
        with self._lock:
            return {key: run.uid for key, run in self._runs.items()}

    def all(self) -> Iterator[Raw]:
        """A snapshot, one after the other."""
        with self._lock:
            known = list(self._runs.values())
        return (unpack(run.packed) for run in known)

    def _put(self, raw: Raw) -> None:
        self._runs[key_of(raw)] = _PackedRun(version_of(raw), _own(raw["metadata"]["uid"]), pack(slim(raw)))


def _own(text: str) -> str:
    """A copy: keeping a string of a parsed list would keep the memory of the whole list."""
    return text.encode().decode()


def pack(raw: Raw) -> bytes:
    """Compressed JSON."""
    return zlib.compress(json.dumps(raw, separators=(",", ":")).encode(), level=1)


def unpack(packed: bytes) -> Raw:
    """The object of compressed JSON."""
    raw: Raw = json.loads(zlib.decompress(packed))
    return raw


def key_of(raw: Raw) -> Key:
    """Namespace and name."""
    metadata = raw["metadata"]
    return Key(_own(metadata["namespace"]), _own(metadata["name"]))


def version_of(raw: Raw) -> int:
    """The resource version as a number; API servers assign growing ones."""
    return number(raw["metadata"].get("resourceVersion"))


def number(version: str | None) -> int:
    """A resource version as a number; 0 for none."""
    return int(version) if version and version.isdigit() else 0


def slim(raw: Raw) -> Raw:
    """A smaller copy of an object: without managedFields, and with digests in place of a ConfigMap's data.

    Nothing reads managedFields, and they are larger than the rest. Every run's ConfigMap may hold the same 200 KB of
    certificates. A slim object stays as it is.
    """
    metadata = {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
    if not isinstance(raw.get("data"), dict):
        return {**raw, "metadata": metadata}
    return {**raw, "metadata": metadata, "data": {key: _digest(value) for key, value in raw["data"].items()}}


def _digest(value: object) -> str:
    text = str(value)
    return text if text.startswith(_DIGEST) else _DIGEST + hashlib.sha256(text.encode()).hexdigest()


def contains(found: object, wanted: object) -> bool:
    """Whether `found` contains all of `wanted`; servers add fields of their own."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and contains(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            return False
        return all(contains(have, want) for have, want in zip(found, wanted, strict=True))
    return found == wanted
