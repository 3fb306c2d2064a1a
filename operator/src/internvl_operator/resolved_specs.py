"""A cache of resolved specs, bounded by their length and with one entry for each run."""

import hashlib
from collections import OrderedDict
from threading import Lock

from internvl_api.validation.cluster import InCluster

from internvl_operator.core.run import Resolved, resolve_spec

LIMIT = 4 * 2**20  # characters of all specs: two thousand usual ones, or four of the largest


class ResolvedSpecs:
    """The newest resolved spec of each run: a run has many passes between two edits, and resolving takes milliseconds.

    Bounded by the specs' total length, the least recently used go first; an edit replaces the entry of its run.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        """`limit`: characters of all specs together."""
        self._limit, self._length, self._lock = limit, 0, Lock()
        self._entries: OrderedDict[str, tuple[object, int, Resolved]] = OrderedDict()

    def get(self, job: str, uid: str, spec_json: str, cluster: InCluster) -> Resolved:
        """The resolved spec of the run with this uid."""
        wanted = job, hashlib.sha256(spec_json.encode()).digest(), cluster
        with self._lock:
            found = self._entries.get(uid)
            if found and found[0] == wanted:
                self._entries.move_to_end(uid)
                return found[2]
        resolved = resolve_spec(job, uid, spec_json, cluster)
        length = len(spec_json) + sum(map(len, cluster.defaults))
        with self._lock:
            self._drop(uid)
            self._entries[uid] = wanted, length, resolved
            self._length += length
            while self._length > self._limit:
                self._drop(next(iter(self._entries)))
        return resolved

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, uid: str) -> None:
        if entry := self._entries.pop(uid, None):
            self._length -= entry[1]
