"""Preflight's look at a checkpoint: weight files that are whole, and a tokenizer that fits model and template."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_trainer.artifacts.https import shard_names
from internvl_trainer.artifacts.sources import list_sizes, read_start
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_format.files import INDEX_FILE, SINGLE_FILE, TensorEntry, list_tensors, read_json
from internvl_trainer.model.checkpoint_format.header import check_header
from internvl_trainer.model.checkpoint_source import CONFIG_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POINTER_BYTES = 1024  # a git-lfs pointer has about 130; no weight file is this short
logger = logging.getLogger(__name__)

_PARALLEL_FILES = 8
_EMBEDDING = re.compile(r"(embed_tokens|tok_embeddings)\.weight$")


def check_weights(directory: Path, source: str) -> None:
    """Raises UserError for a weight file that is missing, a git-lfs pointer or cut short.

    Headers and lengths of all files are read; of a remote file only its start is.
    """
    sizes = list_sizes(source, field="spec.model.source")
    weights = _expected_files(set(sizes), directory, source)
    for name in weights:
        if sizes[name] < _POINTER_BYTES:
            message = (
                f"{name} has {sizes[name]} bytes, as a git-lfs pointer or an interrupted copy has; download the "
                f"weights themselves, with `git lfs pull` in a clone"
            )
            raise UserError("InvalidSafetensors", message, source)
    if all((directory / name).is_file() for name in weights):
        list_tensors(directory)
        return
    entries = read_remote_headers(source, {name: sizes[name] for name in weights})
    if INDEX_FILE in sizes:
        _check_index(directory, entries, source)


def read_remote_headers(source: str, sizes: Mapping[str, int]) -> list[TensorEntry]:
    """The tensors of remote weight files. `sizes`: their names and lengths. Raises UserError for a damaged file."""

    def read(name: str) -> list[TensorEntry]:
        start = partial(read_start, source, name, field="spec.model.source")
        return [entry for entry, _ in check_header(name, sizes[name], start, f"{source}/{name}")]

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        return [entry for entries in pool.map(read, sorted(sizes)) for entry in entries]


def _check_index(directory: Path, entries: Sequence[TensorEntry], source: str) -> None:
    """Raises UserError when a file lacks a tensor that the index says is in it."""
    present = {(entry.name, entry.file.name) for entry in entries}
    placed = read_json(directory / INDEX_FILE, missing="")["weight_map"]
    if lost := min((pair for pair in placed.items() if pair not in present), default=None):
        message = f"{INDEX_FILE} says that tensor {lost[0]} is in this file, but it is not; copy both again"
        raise UserError("TensorMissing", message, f"{source}/{lost[1]}")


def _expected_files(names: set[str], directory: Path, source: str) -> list[str]:
    """The weight files that the checkpoint consists of. Raises UserError when they are not all there."""
    if INDEX_FILE in names:
        shards = shard_names((directory / INDEX_FILE).read_bytes(), f"{source}: {INDEX_FILE}")
        if missing := sorted(shards - names):
            message = f"{len(missing)} of {len(shards)} weight files are missing, such as {missing[0]}"
            raise UserError("ShardMissing", message, source)
        return sorted(shards)
    if SINGLE_FILE not in names:
        message = f"found neither {SINGLE_FILE} nor {INDEX_FILE}; pickled weights are not read"
        raise UserError("WeightsMissing", message, source)
    return [SINGLE_FILE]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, directory: Path, source: str, *, resize: bool = False) -> None:
    """Raises UserError when the tokenizer has ids that the embedding has no row for, and does not get one.

    Args:
        resize: model.resizeEmbeddings.
    """
    rows = _embedding_rows(directory)
    vocabulary = tokenizer.get_vocab()
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if rows is not None and largest >= rows:
        beyond = sum(number >= rows for number in vocabulary.values())
        if resize:
            logger.info("the embedding grows from %d to %d rows: %d tokens are new", rows, largest + 1, beyond)
            return
        message = (
            f"the embedding has {rows} rows, the tokenizer ids up to {largest} ({token!r}): {beyond} tokens have no "
            f"row; set model.resizeEmbeddings to true, or "
            f"put the model's own tokenizer back"
        )
        raise UserError("VocabularyTooLarge", message, source)


def _embedding_rows(directory: Path) -> int | None:
    """Rows of the language model's embedding: from the tensor when weights are local, else from config.json."""
    if (directory / INDEX_FILE).exists() or (directory / SINGLE_FILE).exists():
        try:
            entries = list_tensors(directory)
        except UserError:  # remote weights: the index is here, the shards are not
            entries = []
        if found := next((entry for entry in entries if _EMBEDDING.search(entry.name)), None):
            return found.shape[0]
    config = read_json(directory / CONFIG_FILE, missing="download it again")
    language = config.get("llm_config") or config.get("text_config") or {}
    rows = language.get("vocab_size")
    return rows if isinstance(rows, int) else None
