"""`internvl-trainer inspect`: each row's tokens, labels and tiles as the model sees them; optionally its loss."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
from internvl_api.constants import ExitCode
from internvl_api.spec import Image
from internvl_api.types import DataFormat
from rich.console import Console
from rich.text import Text

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.cli.options import add_picture_arguments, check_target, count, tiles
from internvl_trainer.data.checkpoint_tiling import read_tiling
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding, RowError
from internvl_trainer.data.formats.open_source import Opened, open_source
from internvl_trainer.data.formats.source import media_opener, read_row, shards_of
from internvl_trainer.data.pictures import Decoding
from internvl_trainer.data.row_schema import ChatRow
from internvl_trainer.data.sample import Sample, SampleSettings, build_sample
from internvl_trainer.data.tokenize import IGNORED, IMAGE_CONTEXT, TEMPLATES
from internvl_trainer.errors import UserError
from internvl_trainer.terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from internvl_trainer.model.load import LoadedModel

_LAST_POSITIONS = 16
_LONGEST_CHARACTER = 4  # bytes in UTF-8
_SUPERVISED, _PLAIN, _CONTEXT = ("bold green", "bold bright_green"), ("", "dim"), "cyan"


DESCRIPTION = """\
Show what the model sees of each row of an annotation file: its tokens, which of them are supervised (green), and its
tiles; with --with-loss its loss too.
"""
EXAMPLES = """\
examples:
  internvl-trainer inspect --model InternVL2-2B --annotation train.jsonl --root images --rows 5
  internvl-trainer inspect --model InternVL2-2B --annotation train.jsonl --with-loss --quiet
  internvl-trainer inspect --model InternVL2-2B --annotation train.jsonl --out rows.npz       arrays for NumPy

exit codes: 0 every row could be shown   65 some rows could not, or the model or the file cannot be used
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_row_arguments(parser)
    parser.add_argument("--with-loss", action="store_true", help="also run the model in fp32 and show the loss")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the arrays of every row to this .npz file")
    parser.add_argument("--quiet", action="store_true", help="do not show the tokens")


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that shows rows: the file, the model and how rows become samples."""
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="checkpoint directory, upstream's or native format"
    )
    parser.add_argument("--annotation", required=True, metavar="FILE", help="rows in a format of docs/data.md")
    add_format_arguments(parser)
    parser.add_argument("--root", default=".", metavar="DIR", help="directory of the images and videos (default: .)")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="default: the checkpoint's own")
    parser.add_argument(
        "--image-size", type=count, metavar="N", help="pixels of a tile's side; default: the checkpoint's own"
    )
    parser.add_argument(
        "--min-tiles", type=tiles, metavar="N", help="tiles of an image at least; default: the checkpoint's"
    )
    parser.add_argument(
        "--max-tiles", type=tiles, metavar="N", help="tiles of an image at most; default: the checkpoint's"
    )
    parser.add_argument("--no-thumbnail", action="store_true", help="leave out the small copy of a cut image")
    parser.add_argument("--no-tiling", action="store_true", help="each image is one tile")
    add_picture_arguments(parser)
    parser.add_argument(
        "--video-frames", type=count, default=8, metavar="N", help="frames of a video, evenly spread (default: 8)"
    )
    parser.add_argument(
        "--max-length", type=count, default=8192, metavar="N", help="tokens; longer rows are cut (default: 8192)"
    )
    parser.add_argument("--compat", choices=("default", "upstream"), default="default", help="whose labels to show")
    parser.add_argument("--rows", type=count, metavar="N", help="rows from the start of the file (default: all)")


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """0 when every row could be shown, 65 when some could not.

    Raises:
        UserError: the model or the annotation file cannot be used.
    """
    console = console or Console()
    subject, opened = load_subject(args), open_rows(args)
    if args.out:
        check_target(args.out, shards_of(opened.rows))
    arrays: dict[str, np.ndarray] = {}
    broken = 0
    for number, line, _, sample, findings in read_samples(args, opened, subject):
        if sample is None:
            broken += any(finding.severity == "error" for finding in findings)
            for finding in findings:
                text = printable(str(finding.at(str(args.annotation), line)))
                console.print(text, style="red", markup=False, highlight=False)
            continue
        values = _arrays(sample)
        if subject.loaded:
            values |= _losses(subject.loaded, sample)
        arrays |= {f"s{number}.{key}": value for key, value in values.items()}
        if not args.quiet:
            console.print(_headline(number, line, sample, values), _view(sample, subject.tokenizer), sep="\n")
    if args.out:
        _save(args.out, arrays)
        console.print(f"{len(arrays)} arrays in {args.out}", markup=False, highlight=False)
    return ExitCode.USER_ERROR if broken else ExitCode.OK


@dataclass(frozen=True)
class Subject:
    """Settings, tokenizer, and the model when losses are asked for."""

    tokenizer: PreTrainedTokenizerBase
    settings: SampleSettings
    loaded: LoadedModel | None


def load_subject(args: argparse.Namespace) -> Subject:
    from internvl_trainer.model.checkpoint_format.config import count_context_tokens
    from internvl_trainer.model.checkpoint_source import describe_checkpoint
    from internvl_trainer.model.load import load_chat_model
    from internvl_trainer.model.tokenizer import check_template, load_tokenizer

    loaded = None
    if args.with_loss:
        import torch

        loaded = load_chat_model(args.model, dtype=torch.float32, image_size=args.image_size)
        loaded.model.eval()
    architecture = describe_checkpoint(args.model)
    image_size = args.image_size or architecture.image_size
    tiling = Image(**read_tiling(args.model)).tiling
    settings = SampleSettings(
        template=args.template or architecture.template,
        image_size=image_size,
        context_tokens=count_context_tokens(image_size, architecture.patch_size, architecture.downsample_ratio),
        dynamic_tiles=tiling.dynamic and not args.no_tiling,
        min_tiles=args.min_tiles or min(tiling.min_tiles, args.max_tiles or tiling.min_tiles),
        max_tiles=args.max_tiles or max(tiling.max_tiles, args.min_tiles or 1),
        thumbnail=tiling.thumbnail and not args.no_thumbnail,
        min_frames=args.video_frames,
        max_frames=args.video_frames,
        frame_sampling="middle",
        max_length=args.max_length,
        compat=args.compat,
        decoding=Decoding.of(args.exif, args.background, args.compat),
    )
    tokenizer = load_tokenizer(args.model)
    check_template(tokenizer, settings.template, "--template")
    return Subject(tokenizer, settings, loaded)


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what an annotation is."""
    formats = get_args(DataFormat)
    parser.add_argument("--format", choices=formats, default="auto", help="kind of the rows (default: auto)")
    parser.add_argument("--questions", metavar="FILE", help="VQAv2's questions file")


class RowOutcome(NamedTuple):
    """A row as a sample, or, where `sample` is None, the findings of a row that cannot be used."""

    number: int
    line: int
    row: ChatRow | None
    sample: Sample | None
    findings: list[Finding]


def read_samples(args: argparse.Namespace, opened: Opened, subject: Subject) -> Iterator[RowOutcome]:
    """The rows that the options ask for."""
    index = opened.rows
    opener = media_opener(index, open_media)
    dataset = DatasetDescription(PurePath(args.annotation).stem, args.root, args.annotation)
    for number in range(min(len(index), args.rows or len(index))):
        line = index.line_number(number)
        row, findings = read_row(index, number, dataset.annotation)
        sample = None
        if row is not None:
            try:
                sample = build_sample(row, dataset, subject.settings, subject.tokenizer, opener)
                sample.findings[:0] = findings
            except RowError as error:
                findings = error.findings
        yield RowOutcome(number, line, row, sample, findings)


def open_rows(args: argparse.Namespace) -> Opened:
    """The rows of the annotation that the options name. Raises UserError."""
    return open_source(args.annotation, args.format, field="--annotation", questions=args.questions)


def _arrays(sample: Sample) -> dict[str, np.ndarray]:
    import torch

    from internvl_trainer.model.chat_model import normalise_tiles

    return {
        "input_ids": sample.input_ids.astype(np.int32),
        "labels": sample.labels.astype(np.int32),
        "image_flags": sample.image_flags.astype(np.int32),
        "pixel_values": normalise_tiles(torch.from_numpy(sample.tiles)).numpy(),
    }


def _losses(loaded: LoadedModel, sample: Sample) -> dict[str, np.ndarray]:
    """The row's mean loss (nan where nothing is supervised) and the logits of its last positions."""
    import torch

    from internvl_trainer.data.collate import collate

    with torch.no_grad():
        output = loaded.model(**collate([sample]), return_logits=True)
    if output.loss_sum is None or output.weight_sum is None or output.logits is None:
        raise RuntimeError("the model gave no loss although labels were given")
    return {
        "loss": (output.loss_sum / output.weight_sum).numpy(),
        "logits_last16": output.logits[0, -_LAST_POSITIONS:].numpy(),
    }


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **_keywords(arrays))
    except OSError as error:
        raise UserError("OutputNotWritable", f"cannot be written: {error.strerror}", str(path)) from error


def _keywords(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """savez takes array names as keywords; its stub gives one of its own parameters no room among them."""
    return dict(arrays)


def _headline(number: int, line: int, sample: Sample, values: dict[str, np.ndarray]) -> Text:
    supervised = int((sample.labels != IGNORED).sum())
    facts = [f"{sample.length} tokens", f"{supervised} supervised", f"{int(sample.image_flags.sum())} tiles"]
    if "loss" in values:
        facts.append(f"loss {float(values['loss']):.6f}")
    text = Text(f"\nrow {number} (line {line}): {', '.join(facts)}", style="bold")
    for finding in sample.findings:
        text.append(printable(f"\n{finding.reason}: {finding.message}"), style="yellow")
    return text


def _view(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Supervised tokens in green; neighbours in two shades, to tell them apart; image tokens as a count."""
    view = Text()
    for kind, ids in token_runs(sample, tokenizer):
        if kind == "context":
            view.append(context_text(ids), style=_CONTEXT)
            continue
        for shade, text in enumerate(token_texts(tokenizer, ids)):
            view.append(printable(text), style=(_SUPERVISED if kind == "supervised" else _PLAIN)[shade % 2])
    return view


def token_runs(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """(supervised, plain or context; ids) of neighbouring tokens of one kind."""
    context = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    tokens = zip(sample.input_ids.tolist(), (sample.labels != IGNORED).tolist(), strict=True)
    for (is_context, supervised), group in groupby(tokens, key=lambda token: (token[0] == context, token[1])):
        yield "context" if is_context else "supervised" if supervised else "plain", [token for token, _ in group]


def context_text(ids: Sequence[int]) -> str:
    """The short text for a picture's tokens."""
    return f"{IMAGE_CONTEXT}×{len(ids)}"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token, or of the few tokens that are the bytes of one character."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = _decode(tokenizer, waiting)
        if "\ufffd" not in text or len(waiting) == _LONGEST_CHARACTER:
            yield text
            waiting = []
    if waiting:
        yield _decode(tokenizer, waiting)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """A token's own text; a space at its start, which decoding alone would drop, is kept."""
    text = str(tokenizer.decode(ids))
    first = str(tokenizer.convert_ids_to_tokens(ids[0]))
    return f" {text}" if first.startswith("▁") and not text.startswith(" ") else text
