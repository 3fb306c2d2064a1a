"""`internvl-trainer data convert|stats|preview`: an annotation as upstream's JSONL, in figures, or as a page."""

from __future__ import annotations

import argparse
from pathlib import Path, PurePath

from internvl_api.constants import ExitCode
from rich.console import Console
from rich.table import Table

from internvl_trainer.cli.inspect import (
    RowOutcome,
    Subject,
    add_format_arguments,
    add_row_arguments,
    context_text,
    load_subject,
    open_rows,
    read_samples,
    token_runs,
    token_texts,
)
from internvl_trainer.cli.options import CommandError, check_target, count
from internvl_trainer.data.diagnostics import findings_table
from internvl_trainer.data.formats.export import write_upstream
from internvl_trainer.data.formats.open_source import Opened
from internvl_trainer.data.formats.source import shards_of
from internvl_trainer.data.sample import Sample
from internvl_trainer.data.statistics import DatasetStatistics

DESCRIPTION = """\
Look at training data before a run, in any format that a run reads: convert it to upstream's JSONL, show its figures
(lengths, tiles, repeated rows, near-empty answers), or write a page of its rows as the model sees them.
"""
EXAMPLES = """\
examples:
  internvl-trainer data convert train.parquet train.jsonl                    media go to train.media/
  internvl-trainer data stats --model InternVL2-2B --annotation train.json --root images
  internvl-trainer data preview --model InternVL2-2B --annotation 'shards/*.tar' --rows 50 --out preview.html

exit codes: 0 done, every row can be used   65 some rows, the model or the file cannot be used   69 cannot be written
"""
_SHOWN_FINDINGS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(required=True, dest="action", metavar="ACTION")
    convert = actions.add_parser("convert", help="write an annotation as upstream's JSONL")
    convert.add_argument("annotation", metavar="SRC", help="rows in a format of docs/data.md")
    convert.add_argument("target", type=Path, metavar="DST", help="JSONL file to write")
    add_format_arguments(convert)
    for name, text in (("stats", "show the figures of an annotation"), ("preview", "write a page of its rows")):
        action = actions.add_parser(name, help=text)
        add_row_arguments(action)
        action.set_defaults(with_loss=False)
        if name == "preview":
            action.add_argument("--out", required=True, type=Path, metavar="FILE", help="HTML file to write")
            action.add_argument("--shown", type=count, default=30, metavar="N", help="rows on the page (default: 30)")


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Run the chosen action. Raises UserError when the model or the annotation cannot be used."""
    console = console or Console()
    try:
        return {"convert": _convert, "stats": _stats, "preview": _preview}[args.action](args, console)
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be written: {error.strerror}", ExitCode.UNAVAILABLE) from error


def _convert(args: argparse.Namespace, console: Console) -> int:
    opened = open_rows(args)
    check_target(args.target, shards_of(opened.rows))
    done = write_upstream(opened.rows, args.annotation, args.target)
    if done.findings:
        console.print(findings_table(done.findings[:_SHOWN_FINDINGS]))
    media = f", {done.media} media in {done.folder}" if done.media else ""
    console.print(
        f"{opened.taken_for}: {done.rows} rows in {args.target}{media}, {done.left_out} left out", highlight=False
    )
    return ExitCode.USER_ERROR if done.left_out else ExitCode.OK


def _stats(args: argparse.Namespace, console: Console) -> int:
    stats, _ = _measure(args, open_rows(args), load_subject(args), kept=0)
    table = Table("figure", "value", "note", title=stats.taken_for)
    for fact in stats.facts():
        table.add_row(*fact)
    console.print(table)
    if stats.findings:
        console.print(findings_table(stats.findings[:_SHOWN_FINDINGS]))
    return ExitCode.USER_ERROR if stats.broken else ExitCode.OK


def _preview(args: argparse.Namespace, console: Console) -> int:
    from internvl_trainer.report.data_page import PreviewRow, render_data_page, tile_uris

    subject, opened = load_subject(args), open_rows(args)
    check_target(args.out, shards_of(opened.rows))
    stats, shown = _measure(args, opened, subject, kept=args.shown)
    rows: list[PreviewRow] = []
    for number, line, _, sample, _ in shown:
        if sample is None:
            continue
        tiles, left_out = tile_uris(sample.tiles[sample.image_flags.astype(bool)])
        supervised = stats.supervised[len(rows)]
        headline = f"Row {number} (line {line}): {sample.length} tokens, {supervised} supervised"
        rows.append(PreviewRow(headline, _pieces(subject, sample), tiles, left_out))
    page = render_data_page(PurePath(args.annotation).name, stats, rows)
    args.out.write_text(page, encoding="utf-8", errors="replace")
    console.print(f"{len(rows)} rows in {args.out}", highlight=False)
    return ExitCode.USER_ERROR if stats.broken else ExitCode.OK


def _measure(
    args: argparse.Namespace, opened: Opened, subject: Subject, *, kept: int
) -> tuple[DatasetStatistics, list[RowOutcome]]:
    """Figures of every row, and the first rows that can be used."""
    stats = DatasetStatistics(opened.taken_for)
    shown: list[RowOutcome] = []
    for outcome in read_samples(args, opened, subject):
        if outcome.row is None or outcome.sample is None:
            stats.add_broken([finding.at(args.annotation, outcome.line) for finding in outcome.findings])
            continue
        stats.add(outcome.row, outcome.sample)
        if len(shown) < kept:
            shown.append(outcome)
    return stats, shown


def _pieces(subject: Subject, sample: Sample) -> list[tuple[str, str]]:
    """(kind, text) of each run of tokens."""
    return [
        (kind, context_text(ids) if kind == "context" else "".join(token_texts(subject.tokenizer, ids)))
        for kind, ids in token_runs(sample, subject.tokenizer)
    ]
