"""`internvl-trainer chat`: try a model by hand, with one question or in a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from internvl_api.constants import ExitCode
from internvl_api.memory.answering import gpus_of_a_copy, most_gpus_of_a_copy
from internvl_api.spec import Image

from internvl_trainer.cli.chat_group import ChatGroup, started
from internvl_trainer.cli.options import CommandError, add_picture_arguments, count, tiles
from internvl_trainer.data.checkpoint_tiling import tiling_of
from internvl_trainer.data.pictures import DEFAULT, Decoding, ImageProblem, decode_with_notes
from internvl_trainer.data.row_schema import IMAGE_MARK, Turn, check_characters
from internvl_trainer.data.tiling import cut_tiles, fit_tile, stack_tiles
from internvl_trainer.data.tokenize import TEMPLATES
from internvl_trainer.distributed import prepare_environment, usable_cpus
from internvl_trainer.errors import UserError
from internvl_trainer.terminal import printable

if TYPE_CHECKING:
    from internvl_trainer.model.load import LoadedModel

DESCRIPTION = """\
Ask a model about pictures: one question with --question, or a conversation on the terminal. It runs on a GPU
where there is one, or on several that hold a large model together, else on the processor.
"""
EXAMPLES = """\
examples:
  internvl-trainer chat --model InternVL2-2B --image photo.jpg --question "Describe the image."
  internvl-trainer chat --model InternVL2-2B --image before.jpg --image after.jpg      asks until Ctrl-D
  internvl-trainer chat --model InternVL2-2B --adapter artifacts/adapter --image photo.jpg

The directory may be in upstream's or in transformers' format; none of its code is run. Pictures are cut into tiles as
the model's config.json says. <image> in a question places a picture; without it they come before the first question.

exit codes: 0 answered   65 the model or a picture cannot be used
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a checkpoint's directory")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a trained adapter, put on the model")
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="a picture; may be given several times"
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="ask this and end; without it, questions are read from stdin"
    )
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="default: the checkpoint's own")
    parser.add_argument("--max-tiles", type=tiles, metavar="N", help="tiles of a picture; default: the model's")
    parser.add_argument(
        "--max-new-tokens", type=count, default=1024, metavar="N", help="length of an answer (default: 1024)"
    )
    parser.add_argument(
        "--processes",
        type=count,
        metavar="N",
        help="processes that hold the model together, each with a GPU; default: as few as have the memory",
    )
    add_picture_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Answer the question, or each line of stdin. Raises UserError for a model or picture that cannot be used."""
    decoding = Decoding.of(options.exif, options.background)
    images = [read_image(path, decoding) for path in options.image]
    prepare_environment("cuda", 1)
    processes, device = _choose_processes(options)
    with started(processes, device, partial(_begin, options, images)) as (group, talk):
        if options.question is not None:
            print(_shown(group.ask(talk, options.question)))
            return 0
        with suppress(KeyboardInterrupt):
            for question in _questions(talk.loaded):
                try:
                    print(_shown(group.ask(talk, question)), flush=True)
                except UserError as error:  # the conversation goes on
                    print(f"{error.reason}: {error}", file=sys.stderr, flush=True)
    return 0


def _begin(options: argparse.Namespace, images: Sequence[Any], group: ChatGroup) -> Conversation:
    """The same conversation in each process of the group."""
    return Conversation(_load(options, group), images, options)


def read_image(path: Path, decoding: Decoding = DEFAULT) -> Any:
    """A picture, with warnings on stderr about how it is decoded; raises UserError naming the file."""
    try:
        picture, notes = decode_with_notes(path.read_bytes(), decoding)
    except OSError as error:
        raise UserError("ImageMissing", f"cannot be read: {error.strerror}; check the path", str(path)) from error
    except ImageProblem as error:
        raise UserError("ImageUndecodable", str(error), str(path)) from error
    for note in notes:
        print(f"{note.reason}: {printable(str(path))}: {note.message}", file=sys.stderr)
    return picture


@dataclass
class Conversation:
    """A model, its pictures and the turns so far; a refused question is not remembered."""

    loaded: LoadedModel
    images: Sequence[Any]
    options: argparse.Namespace
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str) -> str:
        """The answer, which is remembered with the question."""
        from internvl_trainer.model.greedy_answers import generate_all, make_prompt

        for finding in check_characters(question, "question"):
            raise UserError(finding.reason, finding.message, "question")
        turns = [*self.turns, Turn("human", self._with_marks(question))]
        groups = [cut(image, self.loaded, self.options.max_tiles) for image in self.images]
        tiles = np.concatenate(groups) if groups else None
        template = self.options.template
        prompt = make_prompt(self.loaded, turns, tiles, [len(group) for group in groups], template=template)
        (found,) = generate_all(
            self.loaded, [prompt], template=template, max_new_tokens=self.options.max_new_tokens, min_new_tokens=1
        )
        self.turns = [*turns, Turn("gpt", found.text)]
        return found.text

    def _with_marks(self, question: str) -> str:
        """All pictures have their mark in the first question: where the user put them, else before it."""
        marks = question.count(IMAGE_MARK)
        wanted = 0 if self.turns else len(self.images)
        if marks in (0, wanted):
            return question if marks else f"{IMAGE_MARK}\n" * wanted + question
        raise UserError(
            "ImageMarkMismatch",
            f"found {marks} {IMAGE_MARK} marks for {wanted} pictures; write one for each in the first question or none",
            "question",
        )


def cut(image: Any, loaded: LoadedModel, max_tiles: int | None) -> np.ndarray:
    """(n, 3, S, S) uint8 tiles of a picture, cut as the model's config.json says."""
    tiling = Image(**tiling_of(loaded.upstream_config or {}, "config.json")).tiling
    if not tiling.dynamic:
        return stack_tiles([fit_tile(image, loaded.image_size)])
    most = max_tiles or tiling.max_tiles
    return cut_tiles(image, loaded.image_size, min(tiling.min_tiles, most), most, thumbnail=tiling.thumbnail)


def _choose_processes(options: argparse.Namespace) -> tuple[int, str]:
    """How many processes hold the model, and their device: as few GPUs as have the memory, else all."""
    import torch

    from internvl_trainer.evaluate.weights import answering_from
    from internvl_trainer.model.checkpoint_source import open_checkpoint

    is_on_gpu = torch.cuda.is_available()
    if not is_on_gpu and options.processes is None:
        return 1, "cpu"
    model = answering_from(open_checkpoint(options.model), torch.bfloat16)
    gpus = torch.cuda.device_count() if is_on_gpu else usable_cpus()
    found = options.processes
    if found is None:
        memory = torch.cuda.get_device_properties(0).total_memory
        found = gpus_of_a_copy(model, gpus, memory) or most_gpus_of_a_copy(model, gpus)
    if not model.can_split(found) or found > gpus:
        message = (
            f"--processes: found {found}; the model's {model.heads} heads, {model.kv_heads} key-value heads and "
            f"{model.intermediate} MLP channels must be shared evenly, on at most {gpus} of this machine"
        )
        raise CommandError(message, ExitCode.USER_ERROR)
    return found, "cuda" if is_on_gpu else "cpu"


def _load(options: argparse.Namespace, group: ChatGroup) -> LoadedModel:
    """The model or this process's share of it, on a GPU in bf16 where there is one, else on the CPU in fp32."""
    import torch

    from internvl_trainer.model.checkpoint_source import open_checkpoint
    from internvl_trainer.model.load import load_chat_model
    from internvl_trainer.model.tokenizer import check_template
    from internvl_trainer.model.trained_weights import load_trained

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if device == "cuda" and group.group is not None:
        device = f"cuda:{group.group.local_rank}"
    loaded = load_chat_model(options.model, dtype=dtype, device=torch.device(device), make_shard=group.shard)
    check_template(loaded.tokenizer, options.template or loaded.template, "--template")
    if options.adapter is not None:
        load_trained(loaded.model, options.adapter, open_checkpoint(options.model), shard=loaded.shard)
    loaded.model.to(device).eval()
    return loaded


def _questions(loaded: LoadedModel) -> Iterator[str]:
    """Lines of stdin that are not blank, until its end; a person is shown a prompt."""
    is_person = sys.stdin.isatty()
    if is_person:
        print(f"{loaded.kind} model, template {loaded.template}. Ask; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = input("> " if is_person else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("InvalidEncoding", "not valid UTF-8; convert it: iconv -t UTF-8", "stdin") from error
        if question:
            yield question


def _shown(answer: str) -> str:
    """An answer as a terminal may show it; a pipe gets every character."""
    return printable(answer) if sys.stdout.isatty() else answer
