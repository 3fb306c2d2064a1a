"""Keep the results of checked rows, so that runs with other outputs do not check them again (data.preflight.cache).

The key of a result is a digest of everything that decides it: the annotation's content, settings, tokenizer, checks,
and the media as far as one request can tell. The digest includes the run's namespace, so namespaces share no results.
Each result has a checksum. A writer to the address can forge both, so share it only between runs that trust each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import internvl_trainer
from internvl_trainer.artifacts.inputs import digest_of_file
from internvl_trainer.artifacts.sources import describe_root, fetch_file
from internvl_trainer.artifacts.storage import Storage, StoredFile, open_storage
from internvl_trainer.data.open_datasets import OpenDataset
from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.pair_dataset import OpenPairs
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.row_shards import ShardStore

logger = logging.getLogger(__name__)

FIELD = "spec.data.preflight.cache"
_FOLDER = "internvl-preflight"  # below the user's address, where other files may be
_MOST_BYTES = 4 << 30  # of all results; 10 million rows take about 110 MB
_CODE = ("data/**/*.py", "retrieval/*.py", "model/tokenizer.py", "json_text.py")
_LIBRARIES = ("transformers", "tokenizers", "pillow", "av", "pyarrow")
_TOKENIZER = (".json", ".model", ".txt", ".jinja")


def open_shard_store(
    context: RunContext,
    dataset: OpenDataset | OpenPairs,
    settings: Mapping[str, Any],
    chosen: Sequence[int],
    *,
    tokenizer: str,
) -> ShardStore:
    """The store for the results of a dataset's rows: in the cache, else in the run's own stage until its end.

    Args:
        settings: those that decide what the checks find.
        chosen: numbers of the rows to check.
        tokenizer: digest of the model's tokenizer.
    """
    key = result_key(context, dataset, settings, chosen, tokenizer=tokenizer)
    cache = context.config.data.preflight.cache
    if cache is None:
        return ShardStore(context.storage, context.stages.key("preflight", "shards"), key)
    storage = open_storage(cache.rstrip("/"), field=FIELD)
    make_room(storage, kept=key)
    return ShardStore(storage, _FOLDER, key, shared=True)


def result_key(
    context: RunContext,
    dataset: OpenDataset | OpenPairs,
    settings: Mapping[str, Any],
    chosen: Sequence[int],
    *,
    tokenizer: str,
) -> str:
    """Hex digest of everything that decides the findings and sizes of the chosen rows."""
    description = dataset.description
    about = {
        "namespace": context.config.job.rpartition("/")[0],
        "annotation": [str(description.annotation), digest_files(dataset.shards)],
        "questions": _questions(description.questions),
        "format": [description.format, dataset.taken_for],
        "media": [str(description.root), _media(description.root)],
        "settings": settings,
        "tiles": description.max_tiles,
        "tokenizer": tokenizer,
        "rows": "all" if isinstance(chosen, range) else list(chosen),
        "checks": checks_version(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def digest_files(paths: Sequence[Path]) -> str:
    """The sha256 of a file; of several, that of their digests in order."""
    digests = [digest_of_file(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tokenizer_digest(directory: Path) -> str:
    """Digest of the model's tokenizer files and configuration."""
    files = sorted(path for path in directory.iterdir() if path.suffix in _TOKENIZER and path.is_file())
    return hashlib.sha256("".join(f"{path.name} {digest_of_file(path)}\n" for path in files).encode()).hexdigest()


@lru_cache(maxsize=1)
def checks_version() -> str:
    """Digest of the code that checks rows, with the versions of the libraries that it uses."""
    root = Path(internvl_trainer.__file__).parent
    files = sorted(path for pattern in _CODE for path in root.glob(pattern))
    lines = [f"{path.relative_to(root).as_posix()} {digest_of_file(path)}" for path in files]
    lines += [f"{name} {version(name)}" for name in _LIBRARIES]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def make_room(storage: Storage, *, kept: str, most_bytes: int = _MOST_BYTES) -> None:
    """Delete the oldest results but `kept`, a dataset at a time, until the cache has at most `most_bytes`."""
    folders: dict[str, list[StoredFile]] = defaultdict(list)
    for file in storage.list(f"{_FOLDER}/"):
        folders[file.key.split("/")[1]].append(file)
    sizes = {name: sum(file.size for file in files) for name, files in folders.items()}
    excess = sum(sizes.values()) - most_bytes
    if excess <= 0:
        return
    ages = sorted((_modified(storage, files[0]), name) for name, files in folders.items() if name != kept)
    for _, name in ages:
        if excess <= 0:
            return
        logger.info("the preflight cache has more than %d bytes; deleting its oldest results, %s", most_bytes, name)
        storage.delete(f"{_FOLDER}/{name}/")
        excess -= sizes[name]


def _modified(storage: Storage, file: StoredFile) -> float:
    try:
        return storage.modified(file.key)
    except UserError as error:
        if error.reason == "NotFound":  # another run made room too
            return 0.0
        raise


def _questions(uri: str | None) -> str | None:
    return None if uri is None else digest_of_file(fetch_file(uri, field="spec.data"))


def _media(root: str) -> str:
    """The media's version; `absent` where the root is not there, which the rows that need it report."""
    try:
        return describe_root(root)
    except UserError:
        return "absent"
