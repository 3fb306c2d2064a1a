"""The preflight stage: everything a run needs, checked on a CPU before a GPU is asked for."""

from __future__ import annotations

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

from internvl_api.run_config import RunConfig
from internvl_api.spec import Image
from internvl_api.status import StageResult
from rich.console import Console

from internvl_trainer.artifacts import hub
from internvl_trainer.artifacts.output_layout import PREFLIGHT
from internvl_trainer.artifacts.sources import commit_to_pin, fetch_directory, list_sizes
from internvl_trainer.artifacts.storage import Storage, sha256_of
from internvl_trainer.data.checkpoint_tiling import FIELDS, config_path, read_config
from internvl_trainer.data.diagnostics import Finding, findings_table
from internvl_trainer.data.mixing import mixed_rows
from internvl_trainer.data.open_datasets import (
    VALIDATION,
    OpenDataset,
    describe_datasets,
    open_datasets,
    open_validation,
    sample_settings,
)
from internvl_trainer.data.preflight_results import ROW_SIZES, write_row_sizes
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.check import check_tasks
from internvl_trainer.retrieval.pair_dataset import OpenPairs, open_pairs, open_validation_pairs
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.dataset_checks import (
    CheckedRows,
    check_chat,
    check_pairs,
    count_used,
    describe_checked,
)
from internvl_trainer.stages.preflight_cache import digest_files, tokenizer_digest
from internvl_trainer.stages.row_parts import Part
from internvl_trainer.tracking.clients import check_client

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SHOWN_FINDINGS = 50
_ADAPTER = "spec.model.adapter"
_PURPOSE = {"spec.data": "an epoch", "spec.data.validation": "to validate on"}
Check = Callable[[Any], CheckedRows]


def run(context: RunContext) -> StageResult:
    """Check output, model and rows, cheapest first. Raises UserError for the first thing that stops the run."""
    if not Part.of_this_pod().leads:
        return _check_own_part(context)
    config, reporter, stages = context.config, context.reporter, context.stages
    check_client(config)
    reporter.doing("checking the output")
    check_writable(context.storage)
    datasets, check = _open(context)
    tasks = check_tasks(config, reporter)
    checked = {each.description.name: check(each) for each in datasets}
    findings = {name: each.findings for name, each in checked.items()}
    if config.model.kind == "chat":
        findings["spec.image"] = compare_tiling(config)
    findings["spec.model"] = check_code(config)
    check_adapter(config)
    report = make_report(datasets, checked, findings, skip=config.data.bad_rows == "skip")
    report["model"] = identify_model(config.model.source)
    report["tiling"] = dict(zip(FIELDS, config.image.tiling, strict=True))
    report["tasks"] = [{"name": task.name, "questions": len(task.questions)} for task in tasks]
    for dataset in report["datasets"]:
        logger.info("%s: taken for %s, %d rows", dataset["name"], dataset["takenFor"], dataset["rows"])
        if text := describe_checked(config, dataset["rowsChecked"], dataset["rowsUsed"]):
            logger.warning("%s: %s; training ends at a bad row among the others", dataset["name"], text)
    show(findings)
    stages.discard("preflight")
    with tempfile.TemporaryDirectory(prefix="preflight-") as scratch:
        path = Path(scratch) / PREFLIGHT
        # Half of a surrogate pair, which a row's field may have in its name, becomes its escape in JSON.
        text = json.dumps(report, indent=1, ensure_ascii=False)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        stored = {PREFLIGHT: path}
        sizes = {name: each.sizes for name, each in checked.items() if each.sizes is not None}
        if checked and len(sizes) == len(checked):
            stored[ROW_SIZES] = Path(scratch) / ROW_SIZES
            write_row_sizes(stored[ROW_SIZES], sizes)
        files = stages.upload("preflight", stored)
    refuse_bad_rows(config, report, stages.uri("preflight", PREFLIGHT))
    check_mixing(config, report)
    stages.commit("preflight", files)
    return StageResult(stage="preflight", outcome="succeeded", reason="Checked", message=summary(config, report))


def _check_own_part(context: RunContext) -> StageResult:
    """Check this pod's part of the rows. The first pod reads the results, and checks all else."""
    datasets, check = _open(context)
    for dataset in datasets:
        check(dataset)
    return StageResult(stage="preflight", outcome="succeeded", reason="Checked", message="checked its part of the rows")


def _open(context: RunContext) -> tuple[list[Any], Check]:
    """The run's datasets and the function that checks the rows of one; checks the model too."""
    config, reporter = context.config, context.reporter
    reporter.doing("checking the data")
    if config.model.kind == "retrieval":
        pairs = open_pairs(config) + open_validation_pairs(config)
        reporter.doing("checking the model")
        tokenizer = check_retrieval_model(config)
        return pairs, partial(check_pairs, context, _tokenizer_digest(config), tokenizer)
    datasets = open_datasets(config) + open_validation(config)
    reporter.doing("checking the model")
    settings, chat_tokenizer = check_model(config)
    return datasets, partial(check_chat, context, _tokenizer_digest(config), settings, chat_tokenizer)


def _tokenizer_digest(config: RunConfig) -> str:
    return tokenizer_digest(fetch_directory(config.model.source, field="spec.model.source", weights=False))


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
    if not config.trains or (config.method == "lora" and "upstream" not in config.merge.formats):
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


def check_adapter(config: RunConfig) -> None:
    """Check that the folder spec.model.adapter, if it is set, has an adapter's files. Raises UserError.

    The evaluate stage, which loads the weights of both, checks that the adapter belongs to the model.
    """
    if config.model.adapter is None:
        return
    from internvl_trainer.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE  # imports PyTorch

    names = list_sizes(config.model.adapter, field=_ADAPTER)
    if missing := next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names), None):
        message = f"{missing} is missing in {config.model.adapter}; give a folder that a run published as adapter/"
        raise UserError("FileMissing", message, _ADAPTER)


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


def make_report(
    datasets: Sequence[OpenDataset | OpenPairs],
    checked: dict[str, CheckedRows],
    findings: dict[str, list[Finding]],
    *,
    skip: bool,
) -> dict[str, Any]:
    """preflight.json: counts, every finding, and, with `skip`, the lines that training leaves out.

    `findings`: of the datasets, and of fields of the spec.
    """
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
                "rowsUsed": count_used(dataset),
                "rowsChecked": checked[dataset.description.name].checked,
                "rowsInEpoch": len(dataset.epoch_rows(bad[dataset.description.name] if skip else ())),
                "badRows": len(bad[dataset.description.name]),
            }
            for dataset in datasets
        ],
        "skippedLines": {name: lines for name, lines in bad.items() if lines} if skip else {},
        "findings": [{"dataset": name, **finding.as_dict()} for name, found in findings.items() for finding in found],
    }


def refuse_bad_rows(config: RunConfig, report: dict[str, Any], place: str) -> None:
    """Raises UserError naming the first bad row when there are more than the run may skip."""
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    bad = sum(dataset["badRows"] for dataset in report["datasets"])
    fatal = [finding for finding in errors if finding["line"] is None]
    allowed = config.data.max_bad_rows if config.data.bad_rows == "skip" else 0
    if not fatal and bad <= allowed:
        for field, rows in rows_left(report).items():
            if rows == 0 and config.trains:
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


def summary(config: RunConfig, report: dict[str, Any]) -> str:
    """The result in one line, for the status."""
    if not config.trains:
        tasks = report["tasks"]
        return f"{sum(task['questions'] for task in tasks)} questions in {len(tasks)} test sets"
    rows = ", ".join(f"{count} rows {_PURPOSE[field]}" for field, count in rows_left(report).items())
    bad = sum(len(lines) for lines in report["skippedLines"].values())
    warnings = sum(finding["severity"] == "warning" for finding in report["findings"])
    text = f"{rows}, in {len(report['datasets'])} datasets, {bad} skipped, {warnings} warnings"
    checked, used = (sum(each[key] for each in report["datasets"]) for key in ("rowsChecked", "rowsUsed"))
    sampled = describe_checked(config, checked, used)
    return f"{text}; {sampled}" if sampled else text


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
