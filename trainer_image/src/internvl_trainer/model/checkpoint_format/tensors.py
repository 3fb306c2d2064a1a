"""Tensor names and layouts, converted between upstream's and the native model's as streams of (name, tensor).

Every rule is one row of a table that is read in both directions. Splitting and joining only move rows of a matrix, so
the round trip is bit-equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from .config import Architecture, LanguageKind

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Kind = LanguageKind | Literal["qllama"]
"""A chat model's language-model family, or the retrieval model (InternVL 1.0) as a whole."""


class UnknownTensor(KeyError):
    """No rule of the architecture matches the tensor name."""

    def __str__(self) -> str:
        return str(self.args[0])


class IncompleteTensor(ValueError):
    """Parts of a fused tensor are missing."""


@dataclass(frozen=True)
class Rule:
    """One upstream name and its native names; `{n}` is a layer number, `{leaf}` is weight or bias."""

    upstream: str
    native: tuple[str, ...]
    fusion: str | None = None  # key of _FUSIONS where one upstream tensor is several native ones


def _vision(upstream: str, *native: str, fusion: str | None = None) -> Rule:
    prefix = "model.vision_tower."
    return Rule(f"vision_model.{upstream}", tuple(prefix + name for name in native), fusion)


def _layer(upstream: str, *native: str, fusion: str | None = None) -> Rule:
    return _vision(
        f"encoder.layers.{{n}}.{upstream}", *(f"encoder.layer.{{n}}.{name}" for name in native), fusion=fusion
    )


def _language(upstream: str, *native: str, fusion: str | None = None) -> Rule:
    prefix = "model.language_model."
    return Rule(f"language_model.model.{upstream}", tuple(prefix + name for name in native), fusion)


def _decoder(upstream: str, *native: str, fusion: str | None = None) -> Rule:
    return _language(f"layers.{{n}}.{upstream}", *(f"layers.{{n}}.{name}" for name in native), fusion=fusion)


_VISION_RULES = (
    _vision("embeddings.class_embedding", "embeddings.cls_token"),
    _vision("embeddings.position_embedding", "embeddings.position_embeddings"),
    _vision("embeddings.patch_embedding.{leaf}", "embeddings.patch_embeddings.projection.{leaf}"),
    _layer(
        "attn.qkv.{leaf}",
        "attention.q_proj.{leaf}",
        "attention.k_proj.{leaf}",
        "attention.v_proj.{leaf}",
        fusion="thirds",
    ),
    _layer("attn.proj.{leaf}", "attention.projection_layer.{leaf}"),
    _layer("attn.q_norm.{leaf}", "attention.q_norm.{leaf}"),
    _layer("attn.k_norm.{leaf}", "attention.k_norm.{leaf}"),
    _layer("mlp.fc1.{leaf}", "mlp.fc1.{leaf}"),
    _layer("mlp.fc2.{leaf}", "mlp.fc2.{leaf}"),
    _layer("norm1.{leaf}", "layernorm_before.{leaf}"),
    _layer("norm2.{leaf}", "layernorm_after.{leaf}"),
    _layer("ls1", "lambda_1"),
    _layer("ls2", "lambda_2"),
)
_PROJECTOR_RULES = (
    Rule("mlp1.0.{leaf}", ("model.multi_modal_projector.layer_norm.{leaf}",)),
    Rule("mlp1.1.{leaf}", ("model.multi_modal_projector.linear_1.{leaf}",)),
    Rule("mlp1.3.{leaf}", ("model.multi_modal_projector.linear_2.{leaf}",)),
)
_SAME_NAMED = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down", "gate_up")),
    "input_layernorm",
    "post_attention_layernorm",
)
_LLAMA_RULES = (
    _language("embed_tokens.{leaf}", "embed_tokens.{leaf}"),
    _language("norm.{leaf}", "norm.{leaf}"),
    *(_decoder(f"{name}.{{leaf}}", f"{name}.{{leaf}}") for name in _SAME_NAMED),
    Rule("language_model.lm_head.{leaf}", ("lm_head.{leaf}",)),
)
_INTERNLM2_RULES = (
    _language("tok_embeddings.{leaf}", "embed_tokens.{leaf}"),
    _language("norm.{leaf}", "norm.{leaf}"),
    _decoder(
        "attention.wqkv.{leaf}",
        "self_attn.q_proj.{leaf}",
        "self_attn.k_proj.{leaf}",
        "self_attn.v_proj.{leaf}",
        fusion="kv_groups",
    ),
    _decoder("attention.wo.{leaf}", "self_attn.o_proj.{leaf}"),
    _decoder("feed_forward.w1.{leaf}", "mlp.gate_proj.{leaf}"),
    _decoder("feed_forward.w3.{leaf}", "mlp.up_proj.{leaf}"),
    _decoder("feed_forward.w2.{leaf}", "mlp.down_proj.{leaf}"),
    _decoder("attention_norm.{leaf}", "input_layernorm.{leaf}"),
    _decoder("ffn_norm.{leaf}", "post_attention_layernorm.{leaf}"),
    Rule("language_model.output.{leaf}", ("lm_head.{leaf}",)),
)


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, (name,)) for name in names)


_POOL_PARTS = (
    *(f"norm1_{part}.{{leaf}}" for part in "qkv"),
    *(f"cross_attn.{part}.{{leaf}}" for part in ("q", "k", "v", "proj")),
    *(f"cross_attn.{part}_bias" for part in "qkv"),
)
_CROSS_ATTENTION = tuple(f"cross_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "norm1", "norm2"))
# The retrieval model keeps upstream's names, except that its vision tower is that of the chat models.
_RETRIEVAL_RULES = (
    *(replace(rule, native=tuple(name.removeprefix("model.") for name in rule.native)) for rule in _VISION_RULES),
    *_same("query_tokens", "text_projection", "itm_head.{leaf}"),
    Rule("logit_scale", ("logit_scale",), fusion="scalar"),
    *_same(*(f"{pool}.{part}" for pool in ("clip_projector", "clip_projector2") for part in _POOL_PARTS)),
    *_same("qllama.model.embed_tokens.{leaf}", "qllama.model.norm.{leaf}", "qllama.lm_head.{leaf}"),
    *_same(*(f"qllama.model.layers.{{n}}.{name}.{{leaf}}" for name in (*_SAME_NAMED, *_CROSS_ATTENTION))),
)

DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that old checkpoints store although the config determines them; never loaded."""


def rules_for(kind: Kind) -> tuple[Rule, ...]:
    """All rules of one architecture."""
    if kind == "qllama":
        return _RETRIEVAL_RULES
    language = _INTERNLM2_RULES if kind == "internlm2" else _LLAMA_RULES
    return (*_VISION_RULES, *_PROJECTOR_RULES, *language)


@dataclass(frozen=True)
class _Fusion:
    split: Callable[[torch.Tensor, Architecture], tuple[torch.Tensor, ...]]
    join: Callable[[tuple[torch.Tensor, ...], Architecture], torch.Tensor]


def _split_thirds(fused: torch.Tensor, _: Architecture) -> tuple[torch.Tensor, ...]:
    return tuple(part.contiguous() for part in fused.chunk(3, dim=0))


def _join_thirds(parts: tuple[torch.Tensor, ...], _: Architecture) -> torch.Tensor:
    return torch.cat(parts, dim=0)


def _split_kv_groups(fused: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, ...]:
    """(q, k, v) of wqkv, whose rows are for each KV head its query heads, key and value, head_dim rows each."""
    per_group = architecture.heads // architecture.kv_heads
    grouped = fused.reshape(architecture.kv_heads, per_group + 2, -1, *fused.shape[1:])
    parts = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
    trailing = fused.shape[1:]
    return tuple(part.reshape(-1, *trailing).contiguous() for part in parts)


def _join_kv_groups(parts: tuple[torch.Tensor, ...], architecture: Architecture) -> torch.Tensor:
    counts = (architecture.heads // architecture.kv_heads, 1, 1)
    trailing = parts[0].shape[1:]
    grouped = [
        part.reshape(architecture.kv_heads, count, -1, *trailing) for part, count in zip(parts, counts, strict=True)
    ]
    return torch.cat(grouped, dim=1).flatten(0, 2)


_FUSIONS = {
    "thirds": _Fusion(_split_thirds, _join_thirds),
    "kv_groups": _Fusion(_split_kv_groups, _join_kv_groups),
    # DeepSpeed cannot broadcast a parameter without dimensions.
    "scalar": _Fusion(lambda scalar, _: (scalar.reshape(1),), lambda parts, _: parts[0].reshape(())),
}


def split_fused(tensor: torch.Tensor, rule: Rule, architecture: Architecture) -> tuple[torch.Tensor, ...]:
    """The native tensors of one upstream tensor."""
    return _FUSIONS[rule.fusion].split(tensor, architecture) if rule.fusion else (tensor,)


def join_fused(parts: tuple[torch.Tensor, ...], rule: Rule, architecture: Architecture) -> torch.Tensor:
    """The one upstream tensor of its native parts."""
    return _FUSIONS[rule.fusion].join(parts, architecture) if rule.fusion else parts[0]


@dataclass(frozen=True)
class Match:
    """A rule that matches a name, with the name's layer number and leaf."""

    rule: Rule
    layer: str
    leaf: str

    @property
    def upstream_name(self) -> str:
        return self.rule.upstream.format(n=self.layer, leaf=self.leaf)

    @property
    def native_names(self) -> tuple[str, ...]:
        return tuple(name.format(n=self.layer, leaf=self.leaf) for name in self.rule.native)


def match_upstream(name: str, kind: Kind) -> Match:
    """The rule for an upstream name. Raises UnknownTensor."""
    return _match(name, _compiled(kind)[0], kind)


def match_native(name: str, kind: Kind) -> Match:
    """The rule for a native name. Raises UnknownTensor."""
    return _match(name, _compiled(kind)[1], kind)


def _match(name: str, table: list[tuple[re.Pattern[str], Rule]], kind: str) -> Match:
    for pattern, rule in table:
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            return Match(rule, groups.get("n", ""), groups.get("leaf", ""))
    raise UnknownTensor(f"tensor {name!r} belongs to no part of a {kind} InternVL model")


@cache
def _compiled(kind: Kind) -> tuple[list[tuple[re.Pattern[str], Rule]], list[tuple[re.Pattern[str], Rule]]]:
    rules = rules_for(kind)
    upstream = [(_pattern(rule.upstream), rule) for rule in rules]
    native = [(_pattern(name), rule) for rule in rules for name in rule.native]
    return upstream, native


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{leaf\}", r"(?P<leaf>weight|bias)"))


def to_native(tensors: NamedTensors, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Upstream's tensors under native names, with one tensor in memory at a time.

    Raises:
        UnknownTensor: no rule matches a name.
    """
    for name, tensor in tensors:
        if DERIVED.search(name):
            continue
        match = match_upstream(name, architecture.kind)
        yield from zip(match.native_names, split_fused(tensor, match.rule, architecture), strict=True)


def to_upstream(tensors: NamedTensors, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Native tensors under upstream's names, holding the parts of a fused tensor until all have come.

    Raises:
        UnknownTensor: no rule matches a name.
        IncompleteTensor: the stream ended with a fused tensor's part missing.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        match = match_native(name, architecture.kind)
        if match.rule.fusion is None:
            yield match.upstream_name, tensor
            continue
        parts = waiting.setdefault(match.upstream_name, {})
        parts[name] = tensor
        if len(parts) == len(match.native_names):
            ordered = tuple(parts[part] for part in match.native_names)
            del waiting[match.upstream_name]
            yield match.upstream_name, join_fused(ordered, match.rule, architecture)
    if waiting:
        name, parts = next(iter(waiting.items()))
        raise IncompleteTensor(f"{name} cannot be joined: only {', '.join(sorted(parts))} came")
