"""A conversation becomes token ids and labels, in upstream's templates.

Ids always equal upstream's. Labels differ only where upstream loses supervision: with compat="upstream", a row whose
pieces do not add up to the length of the whole text is not supervised (always so for phi3-chat with two turns or more).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from internvl_trainer.data.diagnostics import Finding, Severity
from internvl_trainer.data.reserved_tokens import Tokens, listed, plain_text_warning, tokenize
from internvl_trainer.data.row_schema import IMAGE_MARK, Role, Turn
from internvl_trainer.data.upstream_labels import label_like_upstream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_MARK = re.compile(r"<\|[a-z_]+\|>")
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Template:
    """How turns become text: each turn is its opening, its text and `end`.

    Attributes:
        system, user, assistant: openings of turns.
        by_turn: each turn is tokenized alone, instead of the whole text at once.
        strips: training strips white space from both ends of every turn.
    """

    name: str
    system_message: str
    system: str
    user: str
    assistant: str
    end: str
    by_turn: bool = False
    strips: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The special tokens around turns, each once."""
        return tuple(dict.fromkeys(_MARK.findall(self.system + self.user + self.assistant + self.end)))

    def open_turn(self, role: Role) -> str:
        """The text before a turn's own."""
        return {"system": self.system, "human": self.user, "gpt": self.assistant}[role]


def _chatml(name: str, system_message: str, end: str, *, by_turn: bool = False, strips: bool = False) -> Template:
    system, user, assistant = (f"<|im_start|>{role}\n" for role in ("system", "user", "assistant"))
    return Template(name, system_message, system, user, assistant, end, by_turn, strips)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _chatml("Hermes-2", _SYSTEM_2, "<|im_end|>"),
        _chatml("internlm2-chat", _SYSTEM_2, "<|im_end|>", strips=True),
        Template("phi3-chat", _SYSTEM_2, "<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
        _chatml("internvl2_5", _SYSTEM_2_5, "<|im_end|>\n", by_turn=True),
    )
}


@dataclass
class EncodedRow:
    """(L,) int64 ids and unshifted labels of one row; labels are -100 where nothing is supervised."""

    input_ids: np.ndarray
    labels: np.ndarray
    findings: list[Finding] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORED).sum())


def image_tokens(tiles: int, context_tokens: int) -> str:
    """The text that replaces one `<image>` mark."""
    return f"{IMAGE_START}{IMAGE_CONTEXT * (tiles * context_tokens)}{IMAGE_END}"


def with_system_turn(turns: Sequence[Turn], template: Template) -> list[Turn]:
    """The turns with a system turn first: the row's own, else the template's."""
    if turns and turns[0].role == "system":
        return list(turns)
    return [Turn("system", template.system_message), *turns]


def encode(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tiles_per_image: Sequence[int] = (),
    context_tokens: int = 256,
    compat: str = "default",
    max_length: int | None = None,
) -> EncodedRow:
    """Ids and labels of one conversation.

    Args:
        tiles_per_image: tiles of each image, in the order of the `<image>` marks; empty for a text-only row, whose
            marks stay text, as upstream leaves them.
        context_tokens: `<IMG_CONTEXT>` tokens for each tile.
        max_length: tokens; a longer row is cut at the end (finding RowTruncated).
    """
    style = TEMPLATES[template]
    turns = with_system_turn(_skip_leading_answer(turns), style)
    if style.strips:
        turns = [replace(turn, text=turn.text.strip()) for turn in turns]
    is_upstream = compat == "upstream"
    images = _ImageTokens(tiles_per_image, context_tokens, is_compact=not is_upstream)
    texts = [_render_turn(parts, turn, style) for parts, turn in zip(images.place(turns), turns, strict=True)]
    if style.by_turn:
        ids, labels, reserved = _encode_by_turn(texts, tokenizer, style, plain=not is_upstream)
    else:
        ids, labels, reserved = _encode_as_one(texts, tokenizer, style, plain=not is_upstream)
        if is_upstream:
            text = "".join(turn.text for turn in texts)
            labels = label_like_upstream(text, ids, tokenizer, style, max_length)
    row = _finish(images.expand(ids, ids, tokenizer), images.expand(labels, ids, tokenizer), max_length, compat)
    row.findings[:0] = _report_reserved(reserved, plain=not is_upstream)
    return row


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tiles_per_image: Sequence[int] = (),
    context_tokens: int = 256,
) -> np.ndarray:
    """(L,) int64 ids of the text that asks for an answer: the turns, then the assistant's opening.

    Args:
        tiles_per_image, context_tokens: as for `encode`.
    """
    style = TEMPLATES[template]
    turns = with_system_turn(turns, style)
    images = _ImageTokens(tiles_per_image, context_tokens, is_compact=True)
    texts = [_render_turn(parts, turn, style) for parts, turn in zip(images.place(turns), turns, strict=True)]
    opening = _RenderedTurn("gpt", style.assistant, ())
    tokens, _ = _tokenize_turns([*texts, opening], tokenizer)
    return images.expand(tokens.ids, tokens.ids, tokenizer)


@dataclass(frozen=True)
class _RenderedTurn:
    """A turn's whole text, and the [start, end) of the parts in it that the row wrote."""

    role: Role
    text: str
    own: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _ImageTokens:
    """Image tokens of a conversation, written short for the tokenizer where that gives the same ids.

    Tokenizers take equal context tokens one by one, thousands for a row. Compact text has one for each image, and
    `expand` repeats it; no other context token may be among the ids then.
    """

    tiles_per_image: Sequence[int]
    context_tokens: int
    is_compact: bool

    def place(self, turns: Sequence[Turn]) -> list[list[str]]:
        """Each turn as parts: its own texts, with an image's tokens between two of them.

        The first `<image>` marks become images, one each; answers keep theirs as text, so no image is ever supervised.
        """
        images = [
            image_tokens(1, 1) if self.is_compact else image_tokens(tiles, self.context_tokens)
            for tiles in self.tiles_per_image
        ]
        return [[turn.text] if turn.role == "gpt" else _split_at_marks(turn.text, images) for turn in turns]

    def expand(self, values: np.ndarray, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """(L',) values of the tokens `ids` (L,), repeated where an image's one context token stands for all."""
        if not self.is_compact:
            return values
        places = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT))
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = [tiles * self.context_tokens for tiles in self.tiles_per_image][: len(places)]
        return np.repeat(values, repeats)


def _split_at_marks(text: str, images: list[str]) -> list[str]:
    """The text before, between and after its marks, with the next of `images` (which it uses up) in place of each."""
    pieces = text.split(IMAGE_MARK, len(images))
    parts = pieces[:1]
    for piece in pieces[1:]:
        parts += [images.pop(0), piece]
    return parts


def _render_turn(parts: Sequence[str], turn: Turn, template: Template) -> _RenderedTurn:
    text, own = template.open_turn(turn.role), []
    for number, part in enumerate(parts):
        if number % 2 == 0:  # the others are image tokens
            own.append((len(text), len(text) + len(part)))
        text += part
    return _RenderedTurn(turn.role, text + template.end, tuple(own))


def _skip_leading_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Upstream drops an answer that no question precedes."""
    return turns[1:] if turns and turns[0].role == "gpt" else turns


def _tokenize_turns(
    turns: Sequence[_RenderedTurn], tokenizer: PreTrainedTokenizerBase, *, plain: bool = True
) -> tuple[Tokens, list[str]]:
    """The tokens of the whole text, and the reserved tokens that rows wrote in it."""
    own, position = [], 0
    for turn in turns:
        own += [(position + start, position + end) for start, end in turn.own]
        position += len(turn.text)
    return tokenize("".join(turn.text for turn in turns), tokenizer, own, plain=plain)


def _encode_as_one(
    turns: Sequence[_RenderedTurn], tokenizer: PreTrainedTokenizerBase, template: Template, *, plain: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokenize the whole text; tokens that begin inside an answer or its end mark are supervised."""
    tokens, reserved = _tokenize_turns(turns, tokenizer, plain=plain)
    labels = np.full_like(tokens.ids, IGNORED)
    position = 0
    for turn in turns:
        answer = position + len(template.open_turn(turn.role))
        position += len(turn.text)
        if turn.role == "gpt":
            inside = (tokens.starts >= answer) & (tokens.starts < position) & (tokens.ends > answer)
            labels[inside] = tokens.ids[inside]
    return tokens.ids, labels, reserved


def _encode_by_turn(
    turns: Sequence[_RenderedTurn], tokenizer: PreTrainedTokenizerBase, template: Template, *, plain: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokenize each turn alone; an answer is supervised without its opening and without its last newline."""
    bos = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    opening = len(tokenizer(template.assistant, add_special_tokens=False)["input_ids"])
    ids, labels, reserved = list(bos), [IGNORED] * len(bos), []
    for turn in turns:
        found, names = tokenize(turn.text, tokenizer, turn.own, plain=plain, add_special_tokens=False)
        tokens = found.ids.tolist()
        reserved += names
        answer = turn.role == "gpt"
        ids += tokens
        labels += [IGNORED] * opening + tokens[opening:-1] + [IGNORED] if answer else [IGNORED] * len(tokens)
    return np.array(ids, np.int64), np.array(labels, np.int64), list(dict.fromkeys(reserved))


def _report_reserved(names: Sequence[str], *, plain: bool) -> list[Finding]:
    if not names:
        return []
    if plain:
        return [plain_text_warning(names, "conversations")]
    message = f"the text contains {listed(names)}, which data.compat: upstream reads as a mark; remove it from the text"
    return [Finding("ReservedToken", message, "conversations")]


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
        # With compat="upstream" lost rows stay: they are part of the number to reproduce.
        severity: Severity = "warning" if compat == "upstream" else "error"
        findings.append(
            Finding("NothingSupervised", "no token is supervised; the row teaches nothing", "conversations", severity)
        )
    return EncodedRow(ids, labels, findings)
