"""The preflight stage: everything a run needs, checked on a CPU before a GPU is asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from internvl_api.run_config import RunConfig
from internvl_api.spec import Image
from internvl_api.status import StageResult
from rich.console import Console

from internvl_trainer.artifacts import hub
from internvl_trainer.artifacts.output_layout import PREFLIGHT
from internvl_trainer.artifacts.sources import commit_to_pin, fetch_directory, open_media
from internvl_trainer.artifacts.storage import Storage, sha256_of
from internvl_trainer.data.checkpoint_tiling import FIELDS, config_path, read_config
from internvl_trainer.data.diagnostics import Finding, findings_table, fold_repeated
from internvl_trainer.data.mixing import mixed_rows
from internvl_trainer.data.open_datasets import (
    VALIDATION,
    OpenDataset,
    describe_datasets,
    open_datasets,
    open_validation,
    picture_decoding,
    sample_settings,
)
from internvl_trainer.data.preflight_results import ROW_SIZES, write_row_sizes
from internvl_trainer.data.row_checks import Checker, check_length, check_rows
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.distributed import usable_cpus
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.check import check_tasks
from internvl_trainer.metrics import Reporter
from internvl_trainer.retrieval.pair_checks import check_captions
from internvl_trainer.retrieval.pair_dataset import OpenPairs, open_pairs, open_validation_pairs
from internvl_trainer.run_context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 5000  # between two progress reports
_SHOWN_FINDINGS = 50
_PURPOSE = {"spec.data": "an epoch", "spec.data.validation": "to validate on"}
Check = Callable[[Any, Reporter, np.ndarray], list[Finding]]


def run(context: RunContext) -> StageResult:
    """Check output, model and rows, cheapest first. Raises UserError for the first thing that stops the run."""
    config, reporter, stages = context.config, context.reporter, context.stages
    reporter.doing("checking the output")
    check_writable(context.storage)
    datasets, check = _open(context)
    tasks = check_tasks(config, reporter)
    sizes = {each.description.name: np.zeros((count_used(each), 2), np.int32) for each in datasets}
    findings = {each.description.name: check(each, reporter, sizes[each.description.name]) for each in datasets}
    if config.model.kind == "chat":
        findings["spec.image"] = compare_tiling(config)
    findings["spec.model"] = check_code(config)
    report = make_report(datasets, findings, skip=config.data.bad_rows == "skip")
    report["model"] = identify_model(config.model.source)
    report["tiling"] = dict(zip(FIELDS, config.image.tiling, strict=True))
    report["tasks"] = [{"name": task.name, "questions": len(task.questions)} for task in tasks]
    for dataset in report["datasets"]:
        logger.info("%s: taken for %s, %d rows", dataset["name"], dataset["takenFor"], dataset["rows"])
    show(findings)
    stages.discard("preflight")
    with tempfile.TemporaryDirectory(prefix="preflight-") as scratch:
        path = Path(scratch) / PREFLIGHT
        # Half of a surrogate pair, which a row's field may have in its name, becomes its escape in JSON.
        text = json.dumps(report, indent=1, ensure_ascii=False)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        write_row_sizes(Path(scratch) / ROW_SIZES, sizes)
        files = stages.upload("preflight", {PREFLIGHT: path, ROW_SIZES: Path(scratch) / ROW_SIZES})
    refuse_bad_rows(config, report, stages.uri("preflight", PREFLIGHT))
    check_mixing(config, report)
    stages.commit("preflight", files)
    return StageResult(stage="preflight", outcome="succeeded", reason="Checked", message=summary(report))


def _open(context: RunContext) -> tuple[list[Any], Check]:
    """The run's datasets and the function that checks the rows of one; checks the model too."""
    config, reporter = context.config, context.reporter
    reporter.doing("checking the data")
    if config.model.kind == "retrieval":
        pairs = open_pairs(config) + open_validation_pairs(config)
        reporter.doing("checking the model")
        return pairs, partial(check_pairs, config, check_retrieval_model(config))
    datasets = open_datasets(config) + open_validation(config)
    reporter.doing("checking the model")
    return datasets, partial(check_one, *check_model(config))


def check_writable(storage: Storage) -> None:
    """Raises UserError unless the output permits what later stages do: list, write, read and delete."""
    key = f".probe-{uuid.uuid4().hex}"
    next(storage.list(key), None)  # list first: some servers create a missing bucket on write
    storage.write(key, b"probe")
    storage.read(key)
    storage.delete(key)


def check_model(config: RunConfig) -> tuple[SampleSettings, PreTrainedTokenizerBase]:
    """How rows become samples, and the tokenizer. Raises UserError for a checkpoint that training cannot load.

    Remote weight files are listed, not downloaded.
    """
    directory = check_files(config)

    from internvl_trainer.model.tokenizer import check_template, load_tokenizer  # slow, so after the quick checks
    from internvl_trainer.stages.checkpoint_checks import check_vocabulary

    settings, tokenizer = read_settings(config, directory), load_tokenizer(directory)
    check_template(tokenizer, settings.template, "spec.model.template")
    check_vocabulary(tokenizer, directory, config.model.source, resize=config.model.resize_embeddings)
    return settings, tokenizer


def check_retrieval_model(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a retrieval model. Raises UserError for a checkpoint that training cannot load."""
    directory = check_files(config)

    from internvl_trainer.model.tokenizer import read_tokenizer
    from internvl_trainer.retrieval.load import describe_retrieval_checkpoint

    architecture = describe_retrieval_checkpoint(directory, config.image.tile_size)
    tokenizer = read_tokenizer(directory)
    words, embedded = tokenizer.vocab_size, architecture.qllama.vocab_size
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None or words > embedded:
        message = f"expected a start and an end token and at most {embedded} tokens, as config.json has; found {words}"
        raise UserError("InvalidTokenizer", f"{message}; copy the tokenizer of InternVL-14B-224px", config.model.source)
    return tokenizer


def check_files(config: RunConfig) -> Path:
    """A local folder with the checkpoint except its weights. Raises UserError for missing or broken weight files."""
    from internvl_trainer.stages.checkpoint_checks import check_weights

    source = config.model.source
    directory = fetch_directory(source, field="spec.model.source", weights=False)
    check_weights(directory, source)
    return directory


def identify_model(source: str) -> dict[str, str]:
    """Which model it is: the commit of a Hub repository, and the digest of config.json."""
    field = "spec.model.source"
    config = fetch_directory(source, field=field, weights=False) / "config.json"
    commit = {"commit": hub.commit_of(hub.repository(source, field=field))} if source.startswith("hf://") else {}
    return {**commit, "config.json sha256": sha256_of(config)}


def read_settings(config: RunConfig, directory: Path) -> SampleSettings:
    """How rows become samples, from the spec and the checkpoint's config.json."""
    from internvl_trainer.model.checkpoint_source import describe_checkpoint

    architecture = describe_checkpoint(directory)
    if config.image.tile_size is not None:
        architecture = replace(architecture, image_size=config.image.tile_size)
    return sample_settings(
        config,
        template=architecture.template,
        image_size=architecture.image_size,
        context_tokens=architecture.context_tokens,
    )


def check_code(config: RunConfig) -> list[Finding]:
    """A warning when a model in upstream's format will be published without the base model's *.py."""
    if config.method == "lora" and "upstream" not in config.merge.formats:
        return []
    source = config.model.source
    commit = commit_to_pin(source, field="spec.model.source")
    if commit is None:
        return []
    pinned = f"{source.partition('@')[0]}@{commit}"
    message = (
        f"found {source}, which names no commit, so that its *.py can change at any time; they are left out of the "
        f"published model, which AutoModel then cannot load. Check the code, then set spec.model.source to {pinned}"
    )
    return [Finding("CodeLeftOut", message, "model.source", "warning")]


def compare_tiling(config: RunConfig) -> list[Finding]:
    """A warning for each setting of pictures in which the run differs from the checkpoint's config.json."""
    directory = fetch_directory(config.model.source, field="spec.model.source", weights=False)
    stored = read_config(config_path(directory))
    findings = []
    for key, name in FIELDS.items():
        field = Image.model_fields[name].alias or name
        own = getattr(config.image, name)
        if own is not None and key in stored and stored[key] != own:
            message = (
                f"the run has {json.dumps(own)}, the checkpoint's config.json {json.dumps(stored[key])}; a model "
                f"published with its own value answers worse with another. Remove spec.image.{field} to follow it"
            )
            findings.append(Finding("TilingDiffers", message, f"image.{field}", "warning"))
    return findings


def count_used(dataset: OpenDataset | OpenPairs) -> int:
    """The number of the file's rows that an epoch uses: all of them or the first ones."""
    return min(len(dataset.index), dataset.description.count_rows(len(dataset.index)))


def check_one(
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    dataset: OpenDataset,
    reporter: Reporter,
    sizes: np.ndarray,
) -> list[Finding]:
    """Findings in the rows that an epoch uses; writes each row's tokens and tiles into `sizes` (rows, 2)."""
    description, index = dataset.description, dataset.index
    findings = check_length(description, len(index))
    checker = Checker(description, settings, dataset.media_opener(open_media), tokenizer)
    used = count_used(dataset)
    for start in range(0, used, _CHUNK_ROWS):
        reporter.doing(f"checking rows of {description.name}: {start} of {used}")
        rows = range(start, min(used, start + _CHUNK_ROWS))
        findings += check_rows(index, checker, rows=rows, threads=usable_cpus(), sizes=sizes)
    return fold_repeated(findings)


def check_pairs(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, dataset: OpenPairs, reporter: Reporter, sizes: np.ndarray
) -> list[Finding]:
    """Findings in a caption file and in the pairs that an epoch uses; writes tokens and pictures into `sizes`."""
    description, captions = dataset.description, dataset.index[: len(sizes)]
    reporter.doing(f"checking pairs of {description.name}: {len(captions)}")
    of_rows = check_captions(
        description,
        captions,
        open_media,
        tokenizer,
        max_tokens=config.training.max_seq_length,
        threads=usable_cpus(),
        sizes=sizes,
        decoding=picture_decoding(config),
    )
    found = check_length(description, len(dataset.index)) + dataset.findings + of_rows
    return fold_repeated(sorted(found, key=lambda finding: finding.line or 0))


def make_report(
    datasets: Sequence[OpenDataset | OpenPairs], findings: dict[str, list[Finding]], *, skip: bool
) -> dict[str, Any]:
    """preflight.json: counts, every finding, and, with `skip`, the lines that training leaves out."""
    bad = {name: bad_lines(found) for name, found in findings.items()}
    return {
        "version": 1,
        "datasets": [
            {
                "name": dataset.description.name,
                "annotation": str(dataset.description.annotation),
                "takenFor": dataset.taken_for,
                "sha256": digest_files(dataset.shards),
                "rows": len(dataset.index),
                "rowsInEpoch": len(dataset.epoch_rows(bad[dataset.description.name] if skip else ())),
                "badRows": len(bad[dataset.description.name]),
            }
            for dataset in datasets
        ],
        "skippedLines": {name: lines for name, lines in bad.items() if lines} if skip else {},
        "findings": [{"dataset": name, **finding.as_dict()} for name, found in findings.items() for finding in found],
    }


def digest_files(paths: Sequence[Path]) -> str:
    """The sha256 of a file; of several, that of their digests in order."""
    digests = [sha256_of(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def refuse_bad_rows(config: RunConfig, report: dict[str, Any], place: str) -> None:
    """Raises UserError naming the first bad row when there are more than the run may skip."""
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    bad = sum(dataset["badRows"] for dataset in report["datasets"])
    fatal = [finding for finding in errors if finding["line"] is None]
    allowed = config.data.max_bad_rows if config.data.bad_rows == "skip" else 0
    if not fatal and bad <= allowed:
        for field, rows in rows_left(report).items():
            if rows == 0:
                raise UserError("NoRowsLeft", f"no row is left in it; see {place}", field)
        return
    first = (fatal or errors)[0]
    finding = Finding(**{key: value for key, value in first.items() if key != "dataset"})
    step = f"{bad} bad rows, {allowed} allowed; " if config.data.bad_rows == "skip" else ""
    more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
    # A problem of a whole file has no line to skip.
    advice = "correct the file" if fatal else "correct them, or set data.badRows: skip with data.maxBadRows"
    raise UserError(finding.reason, f"{finding}{more}; {step}{advice}. All are in {place}")


def check_mixing(config: RunConfig, report: dict[str, Any]) -> None:
    """Raises UserError for weights that training would refuse, such as one that gives a dataset no row."""
    rows = {dataset["name"]: dataset["rowsInEpoch"] for dataset in report["datasets"]}
    described = [description for description, _ in describe_datasets(config)]
    mixed_rows(described, [rows[each.name] for each in described], config.data.mixing_temperature, seed=0)


def rows_left(report: dict[str, Any]) -> dict[str, int]:
    """Rows of an epoch by field: spec.data, and spec.data.validation where there are such datasets."""
    rows = {"spec.data": 0}
    for dataset in report["datasets"]:
        field = "spec.data.validation" if dataset["name"].startswith(VALIDATION) else "spec.data"
        rows[field] = rows.get(field, 0) + dataset["rowsInEpoch"]
    return rows


def summary(report: dict[str, Any]) -> str:
    """The result in one line, for the status."""
    rows = ", ".join(f"{count} rows {_PURPOSE[field]}" for field, count in rows_left(report).items())
    bad = sum(len(lines) for lines in report["skippedLines"].values())
    warnings = sum(finding["severity"] == "warning" for finding in report["findings"])
    return f"{rows}, in {len(report['datasets'])} datasets, {bad} skipped, {warnings} warnings"


def show(findings: dict[str, list[Finding]]) -> None:
    """Print the first findings as a table."""
    every = [finding for found in findings.values() for finding in found]
    if every:
        width = None if os.isatty(1) else 200
        Console(width=width).print(findings_table(every[:_SHOWN_FINDINGS]))
        if len(every) > _SHOWN_FINDINGS:
            print(f"… and {len(every) - _SHOWN_FINDINGS} more in {PREFLIGHT}")


def bad_lines(findings: Sequence[Finding]) -> list[int]:
    """Lines with an error, in order."""
    return sorted({finding.line for finding in findings if finding.severity == "error" and finding.line is not None})
