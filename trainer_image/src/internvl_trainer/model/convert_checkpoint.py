"""Writes a checkpoint directory in upstream's or transformers' format (hf) from one in either, with optional changes.

The hf directory loads with plain `AutoModelForImageTextToText` and `AutoTokenizer`. Its folder `upstream/` keeps
upstream's files (config.json, tokenizer, *.py) byte for byte for the way back. None of that code is ever run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from internvl_trainer.artifacts.checkpoint_files import is_carried
from internvl_trainer.artifacts.links import files_below
from internvl_trainer.data.tokenize import TEMPLATES
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_format import UnsupportedArchitecture, native_config, read_architecture
from internvl_trainer.model.checkpoint_format.files import (
    INDEX_FILE,
    CheckpointError,
    TensorEntry,
    is_shard_name,
    read_json,
)
from internvl_trainer.model.checkpoint_format.shards import (
    Change,
    Planned,
    plan_native,
    plan_upstream,
    split_as_before,
    split_by_size,
    unchanged,
    write_shards,
)
from internvl_trainer.model.checkpoint_source import CONFIG_FILE, KEPT_FOLDER, Source, open_checkpoint
from internvl_trainer.model.exported_config import write_generation_config, write_image_processor, write_processor
from internvl_trainer.model.parameters import check_checkpoint
from internvl_trainer.model.tokenizer import CONTEXT_TOKEN, load_tokenizer

Format = Literal["upstream", "hf"]

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Edit:
    """Changes to make while a checkpoint is written.

    Attributes:
        change: of the values of native tensors.
        settings: of upstream's config.json.
        image_size: another tile size in pixels; `change` must then resize the position embeddings.
    """

    change: Change = unchanged
    settings: Callable[[dict[str, Any]], dict[str, Any]] = dict
    image_size: int | None = None


@dataclass(frozen=True)
class Converted:
    """Number of written tensors, their bytes, and the weight files."""

    tensors: int
    nbytes: int
    files: tuple[str, ...]


def convert_checkpoint(
    source: Path, target: Path, to: Format, *, shard_size: int | None = None, base: Path | None = None
) -> Converted:
    """Write `source` in the other format to `target`, which appears only when it is complete.

    Args:
        shard_size: bytes of a weight file; None means 5 GB, or upstream's original files on the way back.
        base: a directory of the same model in upstream's format, for its config.json, tokenizer and *.py, when an hf
            directory does not keep them.

    Raises:
        UserError: a directory cannot be used; names the file and the next step.
    """
    _check_target(target)
    opened = open_checkpoint(source)
    if opened.is_native == (to == "hf"):
        found = "hf" if opened.is_native else "upstream"
        raise UserError("SameFormat", f"is in the {found} format already; there is nothing to convert", str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        unfinished.chmod(0o755)
        done = write_checkpoint(opened, unfinished, to, shard_size=shard_size, base=base)
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return done


def write_checkpoint(
    source: Source,
    target: Path,
    to: Format,
    edit: Edit = Edit(),
    *,
    shard_size: int | None = None,
    base: Path | None = None,
) -> Converted:
    """Fill the folder `target` with a checkpoint in the format `to`, one tensor in memory at a time.

    Raises:
        UserError: as convert_checkpoint.
    """
    if to == "hf":
        return _write_hf(source, target, edit, shard_size)
    return _write_upstream(source, target, edit, shard_size, base)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError("TargetExists", "is a file; name a directory that is empty or not there", str(target))
    if target.is_dir() and (names := sorted(path.name for path in target.iterdir())):
        raise UserError(
            "TargetNotEmpty",
            f"found {len(names)} entries, such as {names[0]}; name a directory that is empty or not there",
            str(target),
        )


def _write_hf(source: Source, target: Path, edit: Edit, shard_size: int | None) -> Converted:
    if source.architecture.pixel_shuffle_version != "v2":
        raise UserError(
            "NotExpressible",
            f"ps_version is {source.architecture.pixel_shuffle_version!r}; transformers' InternVL knows only the pixel "
            f"shuffle 'v2' and would compute something else. Keep this model in upstream's format",
            str(source.directory / CONFIG_FILE),
        )
    tokenizer = load_tokenizer(source.directory)
    config: Any = source.config
    config.image_token_id = int(tokenizer.get_vocab()[CONTEXT_TOKEN])
    config.architectures = ["InternVLForConditionalGeneration"]
    config.dtype = config.vision_config.dtype = config.text_config.dtype = _main_dtype(source.entries)
    check_checkpoint(source, config)
    if edit.image_size is not None:
        config.vision_config.image_size = (edit.image_size, edit.image_size)
        config.image_seq_length = replace(source.architecture, image_size=edit.image_size).context_tokens
    planned = plan_native(source.pieces(), source.architecture, edit.change)
    files = files_as_before(planned) if source.is_native and shard_size is None else None
    done = _write(files or split_by_size(planned, shard_size or SHARD_SIZE), target)
    tokenizer.save_pretrained(target)
    config.save_pretrained(target)
    if source.upstream_config is not None:
        settings = edit.settings(source.upstream_config)
        _write_settings(settings, source.upstream_config, target / KEPT_FOLDER)
        write_image_processor(settings, config.vision_config.image_size[0], target)
        template = settings.get("template") or source.architecture.template
        write_processor(template, config.image_seq_length, target)
        end = int(tokenizer.get_vocab()[TEMPLATES[template].end.strip()])
        write_generation_config(source.directory, end, target)
    if source.is_native:
        copy_files(source.directory, target)
        return done
    copy_files(source.directory, target / KEPT_FOLDER)
    return done


def _write_upstream(source: Source, target: Path, edit: Edit, shard_size: int | None, base: Path | None) -> Converted:
    kept = base or (source.directory / KEPT_FOLDER if source.is_native else source.directory)
    if base is None and not (kept / CONFIG_FILE).exists():
        raise UserError(
            "UpstreamFilesMissing",
            f"there is no {KEPT_FOLDER}/{CONFIG_FILE} in it, which `convert --to hf` keeps; give --base a directory in "
            f"upstream's format of the same model, for its config.json, tokenizer and *.py",
            str(source.directory),
        )
    path = kept / CONFIG_FILE
    upstream = read_json(path, missing="give --base a checkpoint's directory in upstream's format")
    try:
        architecture, config = read_architecture(upstream), native_config(upstream, image_token_id=-1)
    except (UnsupportedArchitecture, KeyError, ValueError) as error:
        raise CheckpointError("UnsupportedArchitecture", str(error), str(path)) from error
    load_tokenizer(kept)  # raises with the name of a missing file
    source = replace(source, architecture=architecture)
    check_checkpoint(source, config)
    planned = plan_upstream(source.pieces(), architecture, edit.change)
    files = None if source.is_native or shard_size is not None else files_as_before(planned)
    done = _write(files or _upstream_files(planned, kept, shard_size), target)
    _write_settings(edit.settings(upstream), upstream, target)
    copy_files(kept, target)
    return done


def files_as_before(planned: Sequence[Planned]) -> Mapping[str, Sequence[Planned]]:
    """Source file to the tensors whose first piece is in it."""
    files: dict[str, list[Planned]] = {}
    for tensor in planned:
        files.setdefault(tensor.pieces[0].entry.file.name, []).append(tensor)
    return dict(sorted(files.items()))


def _upstream_files(planned: Sequence[Planned], kept: Path, shard_size: int | None) -> Mapping[str, Sequence[Planned]]:
    """Upstream's original files when its index is kept and no size is asked for, else files by size."""
    if shard_size is None and (kept / INDEX_FILE).exists():
        weight_map = read_json(kept / INDEX_FILE, missing="").get("weight_map")
        if isinstance(weight_map, dict) and all(is_shard_name(file) for file in weight_map.values()):
            files = split_as_before(planned, weight_map)
            if files is not None:
                return files
    return split_by_size(planned, shard_size or SHARD_SIZE)


def _write(files: Mapping[str, Sequence[Planned]], target: Path) -> Converted:
    written = tuple(write_shards(files, target))
    tensors = [tensor for planned in files.values() for tensor in planned]
    return Converted(len(tensors), sum(tensor.nbytes for tensor in tensors), written)


def _write_settings(settings: dict[str, Any], upstream: dict[str, Any], directory: Path) -> None:
    """Write config.json only when it changed; otherwise it is copied with the other files, byte for byte."""
    if settings != upstream:
        directory.mkdir(exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _main_dtype(entries: Sequence[TensorEntry]) -> torch.dtype:
    return Counter(entry.dtype for entry in entries).most_common(1)[0][0]


def copy_files(source: Path, target: Path) -> None:
    """Copy the files that `is_carried` accepts: tokenizer, configuration, model card and upstream's *.py.

    A file that is in `target` already stays as it is.
    """
    for path in files_below(source):
        name = path.relative_to(source)
        if not is_carried(name.as_posix()) or (target / name).exists():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
