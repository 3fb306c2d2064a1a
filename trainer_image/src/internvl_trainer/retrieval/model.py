"""The model of InternVL 1.0 stage 2: InternViT and QLLaMA with learned queries, for retrieval and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.utils.generic import ModelOutput

from internvl_trainer.model.chat_model import add_drop_path, normalise_tiles
from internvl_trainer.retrieval.architecture import RetrievalArchitecture
from internvl_trainer.retrieval.attention import AttentionPool
from internvl_trainer.retrieval.losses import contrastive_loss, gather_tokens, matching_loss, mine_negatives
from internvl_trainer.retrieval.qllama import QLlamaForCausalLM, additive_mask, causal

Variant = Literal["C", "G"]
"""InternVL-C compares the vision tower's pooled features with texts; -G adds those of the queries."""


Texts = tuple[torch.Tensor, torch.Tensor]  # ids and mask, (B, L) each


@dataclass
class RetrievalOutput(ModelOutput):
    """fp32 losses of one pass as means over this rank's rows; their mean over ranks is the global batch's loss.

    It is a ModelOutput because ZeRO-3 searches dictionaries for tensors, to know when to gather parameters for the
    backward pass.

    Attributes:
        loss: itc + itm.
        rows: number of pairs.
        negatives_found, positives_found: share of pairs that matching classified correctly.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    negatives_found: torch.Tensor | None = None
    positives_found: torch.Tensor | None = None
    rows: int | None = None

    @property
    def loss_sum(self) -> torch.Tensor | None:
        """The loss as a sum over this rank's pairs, which the training loop adds up."""
        return None if self.loss is None or self.rows is None else self.loss * self.rows


@dataclass
class _Pass:
    """QLLaMA's hidden states of query slots, (B, slots, hidden), and of texts, (B, L, hidden)."""

    queries: torch.Tensor
    texts: torch.Tensor


class RetrievalModel(nn.Module):
    """The retrieval model; names are upstream's, except `vision_tower`, transformers' InternVLVisionModel."""

    architecture: RetrievalArchitecture
    vision_tower: Any  # transformers has no type hints for the parts of its models
    qllama: Any

    def __init__(self, architecture: RetrievalArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        vision, qllama = architecture.vision, architecture.qllama
        self.vision_tower = InternVLVisionModel(vision)
        self.qllama = QLlamaForCausalLM(qllama)
        self.query_tokens = nn.Parameter(torch.zeros(1, qllama.num_query_token, qllama.hidden_size))
        self.text_projection = nn.Parameter(torch.zeros(qllama.hidden_size, architecture.embed_dim))
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.clip_projector = AttentionPool(vision.hidden_size, architecture.pool_heads, architecture.embed_dim)
        self.clip_projector2 = AttentionPool(qllama.hidden_size, architecture.pool_heads, architecture.embed_dim)
        self.itm_head = nn.Linear(qllama.hidden_size, 2)
        self.hard_negatives = False
        for layer in self.vision_tower.encoder.layer:  # transformers fixes these two at 1e-6
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                if not isinstance(norm, nn.Identity):
                    norm.variance_epsilon = vision.layer_norm_eps
        self.reset_rotary()

    @property
    def native(self) -> RetrievalModel:
        """The module that adapters are added to, as for ChatModel."""
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        positive_input_ids: torch.Tensor,
        positive_attention_mask: torch.Tensor,
        negative_input_ids: torch.Tensor,
        negative_attention_mask: torch.Tensor,
        summarize_input_ids: torch.Tensor,
        summarize_attention_mask: torch.Tensor,
        image_ids: torch.Tensor,
        **_caption: torch.Tensor,
    ) -> RetrievalOutput:
        """Losses of a batch of B images. Texts are (B, L) int64, padded on the right, with masks of 1 and 0.

        Args:
            pixel_values: (B, 3, S, S), uint8 (normalised here, on the device) or float (already normalised).
            positive_input_ids: the image's caption, for matching.
            negative_input_ids: another image's caption; with `hard_negatives`, used only where mining finds none.
            summarize_input_ids: the image's caption behind its prompt, for contrast.
            image_ids: (B,) or (B, 1); equal ids are one image.
            _caption: input_ids, attention_mask and labels of upstream's dataset; the retrieval stage has no loss for
                them.
        """
        image_ids = image_ids.reshape(-1)
        image_features = self._see(pixel_values)
        visions = normalise(self.clip_projector(image_features).float())
        scale = self.logit_scale.float().exp()
        summary = summarize_input_ids, summarize_attention_mask
        negative = negative_input_ids, negative_attention_mask
        positive = positive_input_ids, positive_attention_mask
        if self.hard_negatives:  # mining needs the contrast features first
            (contrast,) = self._read(image_features, apart=[summary])
            queries, texts = self._contrasted(contrast, summarize_attention_mask)
            mined = mine_negatives(queries + visions, texts, image_ids, scale)
            candidates = gather_tokens(positive_input_ids), gather_tokens(positive_attention_mask)
            matched = self._read(image_features, together=[_exchange(negative, candidates, mined), positive])
        else:
            contrast, *matched = self._read(image_features, apart=[summary], together=[negative, positive])
            queries, texts = self._contrasted(contrast, summarize_attention_mask)
        logits = [self.itm_head(each.queries).float().mean(1) for each in matched]
        loss_itc = contrastive_loss(visions, queries, texts, image_ids, scale)
        loss_itm = matching_loss(*logits)
        return RetrievalOutput(
            loss=loss_itm + loss_itc,
            loss_itc=loss_itc.detach(),
            loss_itm=loss_itm.detach(),
            negatives_found=(logits[0].argmax(1) == 0).float().mean(),
            positives_found=(logits[1].argmax(1) == 1).float().mean(),
            rows=len(image_ids),
        )

    def encode_images(self, pixel_values: torch.Tensor, variants: Sequence[Variant]) -> dict[Variant, torch.Tensor]:
        """(B, C) features for each variant, with one pass through the vision tower.

        As upstream, InternVL-G's are the sum of the queries' and of InternVL-C's, each normalised.
        """
        image_features = self._see(pixel_values)
        found: dict[Variant, torch.Tensor] = {"C": self.clip_projector(image_features)}
        if "G" in variants:
            queries = self.query_tokens.expand(len(image_features), -1, -1)
            everything = queries.new_zeros(len(queries), 1, queries.shape[1], queries.shape[1])
            hidden = self._decode(queries, everything, image_features)
            found["G"] = normalise(self.clip_projector2(hidden)) + normalise(found["C"])
        return {variant: found[variant] for variant in variants}

    def encode_texts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, C) features of (B, L) int64 texts padded with 0 on the right, the same for both variants."""
        mask = input_ids > 0
        embeddings = self.qllama.model.embed_tokens(input_ids)
        visible = mask[:, None, None, :] & causal(mask.shape[1], mask.shape[1], mask.device)
        hidden = self._decode(embeddings, additive_mask(visible, embeddings.dtype), None)
        return self._project_last(hidden, mask)

    @torch.no_grad()
    def generate(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """(B, 1 + new tokens) int64 ids: the start token, as upstream returns it, and the continuation of the prompt.

        Args:
            input_ids, attention_mask: (B, L) prompts, padded on the left.
            settings: of transformers' generate (num_beams, max_new_tokens, …).
        """
        image_features = self._see(pixel_values)
        embeddings, mask = self._join(input_ids, attention_mask)
        new = self.qllama.generate(
            inputs_embeds=embeddings, attention_mask=mask, vision_hidden_states=image_features, **settings
        )
        start = new.new_full((len(new), 1), self.architecture.qllama.bos_token_id)
        return torch.cat([start, new], dim=1)

    def _see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 1 + patches, width) image features, class token first."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise_tiles(pixel_values)
        features: torch.Tensor = self.vision_tower(pixel_values).last_hidden_state
        return features

    def _join(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, slots + L, hidden) embeddings of query slots and text, and the mask of both."""
        embeddings = self.qllama.model.embed_tokens(input_ids)
        queries = self.query_tokens.expand(len(input_ids), -1, -1)
        mask = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1)
        return torch.cat([queries, embeddings], dim=1), mask

    def _decode(self, embeddings: torch.Tensor, mask: torch.Tensor, vision: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = self.qllama.model(
            inputs_embeds=embeddings, attention_mask=mask, vision_hidden_states=vision, use_cache=False
        ).last_hidden_state
        return hidden

    def _read(self, vision: torch.Tensor, apart: Sequence[Texts] = (), together: Sequence[Texts] = ()) -> list[_Pass]:
        """Hidden states of several texts of each image, in their order, from one pass.

        Args:
            apart: for contrast; queries see only queries, and text sees earlier text.
            together: for matching; queries and text see one another in both directions.
        """
        texts = (*apart, *together)
        length = max(ids.shape[1] for ids, _ in texts)
        ids, masks = (torch.cat([_pad(part, length) for part in parts]) for parts in zip(*texts, strict=True))
        embeddings, mask = self._join(ids, masks)
        columns = mask.shape[1]
        is_query = torch.arange(columns, device=mask.device) < self.architecture.qllama.num_query_token
        alone = causal(columns, columns, mask.device) & ~is_query & ~is_query[:, None] | (is_query & is_query[:, None])
        is_apart = torch.arange(len(mask), device=mask.device) < len(apart) * len(vision)
        visible = mask.bool()[:, None, None, :] & (alone | ~is_apart[:, None, None, None])
        hidden = self._decode(embeddings, additive_mask(visible, embeddings.dtype), vision)
        slots = self.architecture.qllama.num_query_token
        return [_Pass(part[:, :slots], part[:, slots:]) for part in hidden.chunk(len(texts))]

    def _contrasted(self, contrast: _Pass, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C) normalised features of queries and of texts."""
        queries = normalise(self.clip_projector2(contrast.queries).float())
        return queries, normalise(self._project_last(contrast.texts, attention_mask).float())

    def _project_last(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, C) projection of the last token's hidden state into the space of images."""
        last = attention_mask.sum(1) - 1
        projected: torch.Tensor = hidden[torch.arange(len(hidden), device=hidden.device), last] @ self.text_projection
        return projected

    def set_drop_path(self, rate: float) -> None:
        """Add stochastic depth to the vision tower, growing linearly from 0 to `rate` over the layers."""
        add_drop_path(self.vision_tower, rate)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Choose whether both towers recompute activations in the backward pass."""
        for tower in (self.vision_tower, self.qllama):
            if enabled:
                tower.activation_checkpointing_enable({"use_reentrant": False})
                tower.disable_input_require_grads()  # only re-entrant checkpointing needs it
            else:
                tower.activation_checkpointing_disable()

    def reset_rotary(self) -> None:
        """Recompute the rotary frequencies in fp32 on the model's device."""
        old = self.qllama.model.rotary_emb
        device = next(old.buffers()).device
        with torch.device("cpu"):
            fresh = type(old)(config=self.architecture.qllama)
        self.qllama.model.rotary_emb = fresh.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> RetrievalModel:
        """Keep rotary frequencies in fp32 when the weights are cast, as DeepSpeed does with module.bfloat16()."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_rotary()
        return self


def normalise(features: torch.Tensor) -> torch.Tensor:
    """(B, C) rows scaled to length 1."""
    unit: torch.Tensor = features / features.norm(dim=1, keepdim=True)
    return unit


def _pad(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(tokens, (0, length - tokens.shape[1]))


def _exchange(negative: Texts, candidates: Texts, mined: torch.Tensor) -> Texts:
    """The mined candidates, and the given negatives where none was mined."""
    length = max(negative[0].shape[1], candidates[0].shape[1])
    found = (mined >= 0)[:, None]
    ids, mask = (
        torch.where(found, _pad(new, length)[mined], _pad(old, length))
        for new, old in zip(candidates, negative, strict=True)
    )
    return ids, mask
