"""A conversation to token ids and labels, in upstream's templates.

Ids are upstream's in every case. Labels differ from upstream's only where upstream loses supervision: with
compat="upstream" a row whose turns do not add up to the whole (always so for phi3-chat with two turns or more) is not
supervised at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_trainer.data.diagnostics import Finding, Severity
from internvl_trainer.data.row_schema import IMAGE_MARK
from internvl_trainer.data.upstream_labels import label_like_upstream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Template:
    """How turns become text. `by_turn` templates are tokenized turn by turn, the others as one text."""

    name: str
    system_message: str
    system: str
    user: str
    assistant: str
    end: str
    by_turn: bool = False

    def open_turn(self, role: str) -> str:
        return {"system": self.system, "human": self.user, "gpt": self.assistant}[role]


def _chatml(name: str, system_message: str, end: str, *, by_turn: bool = False) -> Template:
    system, user, assistant = (f"<|im_start|>{role}\n" for role in ("system", "user", "assistant"))
    return Template(name, system_message, system, user, assistant, end, by_turn)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _chatml("Hermes-2", _SYSTEM_2, "<|im_end|>"),
        _chatml("internlm2-chat", _SYSTEM_2, "<|im_end|>"),
        Template("phi3-chat", _SYSTEM_2, "<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
        _chatml("internvl2_5", _SYSTEM_2_5, "<|im_end|>\n", by_turn=True),
    )
}


@dataclass(frozen=True)
class Turn:
    """role is system, human or gpt."""

    role: str
    text: str


@dataclass
class EncodedRow:
    """input_ids, labels: (L,) int64, unshifted; labels are -100 where nothing is supervised."""

    input_ids: np.ndarray
    labels: np.ndarray
    findings: list[Finding] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORED).sum())


def image_tokens(tiles: int, context_tokens: int) -> str:
    """What one `<image>` mark becomes."""
    return f"{IMAGE_START}{IMAGE_CONTEXT * (tiles * context_tokens)}{IMAGE_END}"


def with_system_turn(turns: Sequence[Turn], template: Template) -> list[Turn]:
    """The row's own system turn, or the template's."""
    if turns and turns[0].role == "system":
        return list(turns)
    return [Turn("system", template.system_message), *turns]


def encode(
    conversations: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tiles_per_image: Sequence[int] = (),
    context_tokens: int = 256,
    compat: str = "default",
    max_length: int | None = None,
) -> EncodedRow:
    """Ids and labels of one row whose shape preflight's checks accept.

    Args:
        conversations: [{from: human|gpt|system, value}], alternating, a system turn first or not at all.
        tiles_per_image: tiles of each image, in the order of the `<image>` marks; empty for a text-only row, whose
            marks stay as they are (as upstream leaves them).
        context_tokens: `<IMG_CONTEXT>` tokens for each tile.
        max_length: longer rows are cut at the end (finding RowTruncated).
    """
    style = TEMPLATES[template]
    turns = [Turn(turn["from"], turn["value"]) for turn in conversations]
    turns = with_system_turn(_skip_leading_answer(turns), style)
    compact = compat != "upstream" and _is_compact(turns)
    turns = _place_images(
        turns, [1] * len(tiles_per_image) if compact else tiles_per_image, 1 if compact else context_tokens
    )
    if style.by_turn:
        ids, labels = _encode_by_turn(turns, tokenizer, style)
    else:
        ids, labels = _encode_as_one(turns, tokenizer, style)
        if compat == "upstream":
            labels = label_like_upstream(_render(turns, style), ids, tokenizer, style, max_length)
    if compact:
        counts = [tiles * context_tokens for tiles in tiles_per_image]
        ids, labels = _repeat_context(ids, labels, tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT), counts)
    return _finish(ids, labels, max_length, compat)


def _is_compact(turns: Sequence[Turn]) -> bool:
    """A tokenizer takes thousands of equal context tokens one by one: it is given one for each image, repeated later.

    Not where a text has such a token of its own.
    """
    return not any(IMAGE_CONTEXT in turn.text for turn in turns)


def _repeat_context(
    ids: np.ndarray, labels: np.ndarray, context_id: int, counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's one context token, repeated as often as the image has context tokens."""
    repeats = np.ones(len(ids), np.int64)
    places = np.flatnonzero(ids == context_id)
    repeats[places] = counts[: len(places)]
    return np.repeat(ids, repeats), np.repeat(labels, repeats)


def _skip_leading_answer(turns: list[Turn]) -> list[Turn]:
    """Upstream drops an answer that no question precedes."""
    return turns[1:] if turns and turns[0].role == "gpt" else turns


def _place_images(turns: list[Turn], tiles_per_image: Sequence[int], context_tokens: int) -> list[Turn]:
    """`<image>` marks become image tokens, one for each image, from the first mark on."""
    remaining = list(tiles_per_image)
    placed = []
    for turn in turns:
        first, *rest = turn.text.split(IMAGE_MARK)
        text = first
        for piece in rest:
            text += (image_tokens(remaining.pop(0), context_tokens) if remaining else IMAGE_MARK) + piece
        placed.append(Turn(turn.role, text))
    return placed


def _render(turns: Sequence[Turn], template: Template) -> str:
    return "".join(template.open_turn(turn.role) + turn.text + template.end for turn in turns)


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tiles_per_image: Sequence[int] = (),
    context_tokens: int = 256,
) -> np.ndarray:
    """(L,) ids of the text that asks for an answer: the turns so far, then the assistant's mark."""
    style = TEMPLATES[template]
    turns = with_system_turn(turns, style)
    compact = _is_compact(turns)
    written = ([1] * len(tiles_per_image), 1) if compact else (tiles_per_image, context_tokens)
    placed = _place_images(turns, *written)
    ids = np.array(tokenizer(_render(placed, style) + style.assistant)["input_ids"], np.int64)
    if compact:
        counts = [tiles * context_tokens for tiles in tiles_per_image]
        ids, _ = _repeat_context(ids, ids, tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT), counts)
    return ids


def _encode_as_one(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize the whole text; what begins inside an answer or its end mark is supervised."""
    encoded = tokenizer(_render(turns, template), return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int64)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    ends = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
    labels = np.full_like(ids, IGNORED)
    position = 0
    for turn in turns:
        answer = position + len(template.open_turn(turn.role))
        position = answer + len(turn.text) + len(template.end)
        if turn.role == "gpt":
            inside = (starts >= answer) & (starts < position) & (ends > answer)
            labels[inside] = ids[inside]
    return ids, labels


def _encode_by_turn(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize each turn on its own; an answer is supervised without its mark and without the last newline."""
    bos = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    opening = len(tokenizer(template.assistant, add_special_tokens=False)["input_ids"])
    ids, labels = list(bos), [IGNORED] * len(bos)
    for turn in turns:
        text = template.open_turn(turn.role) + turn.text + template.end
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = turn.role == "gpt"
        ids += tokens
        labels += [IGNORED] * opening + tokens[opening:-1] + [IGNORED] if answer else [IGNORED] * len(tokens)
    return np.array(ids, np.int64), np.array(labels, np.int64)


def _finish(ids: np.ndarray, labels: np.ndarray, max_length: int | None, compat: str) -> EncodedRow:
    findings = []
    if max_length is not None and len(ids) > max_length:
        findings.append(
            Finding(
                "RowTruncated",
                f"{len(ids)} tokens are more than the maximum length {max_length}; "
                f"the last {len(ids) - max_length} are cut",
                "conversations",
                "warning",
            )
        )
        ids, labels = ids[:max_length], labels[:max_length]
    if not (labels != IGNORED).any():
        # With compat="upstream" lost rows are wanted: they are part of the number to reproduce.
        severity: Severity = "warning" if compat == "upstream" else "error"
        findings.append(
            Finding("NothingSupervised", "no token is supervised; the row teaches nothing", "conversations", severity)
        )
    return EncodedRow(ids, labels, findings)
