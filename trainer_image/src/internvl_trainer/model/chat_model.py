"""The native InternVL model with what transformers lacks: blank tiles, drop path, pixel shuffle v1, exact loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from .attention import Rows, flat_arguments
from .checkpoint_format import Architecture
from .head_loss import HeadLoss
from .rotary import each_row_alone

IGNORED = -100
"""Label of a position that is not supervised."""

# Channel means and deviations of ImageNet from torchvision, with which upstream normalises every tile.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """(tiles, 3, S, S) fp32 from uint8: / 255, - mean, / deviation, each step rounded as in torchvision.

    The divisors are tensors on the tiles' device because CUDA replaces a division by a Python number with a
    multiplication by its reciprocal, which rounds differently. They are filled there: a copy from the host would wait.
    """
    scale, *channels = (
        torch.full((1, 1, 1), value, dtype=torch.float32, device=tiles.device)
        for value in (255.0, *IMAGENET_MEAN, *IMAGENET_STD)
    )
    mean, std = torch.cat(channels[:3]), torch.cat(channels[3:])
    return tiles.to(torch.float32).div_(scale).sub_(mean).div_(std)


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of a tile with probability `rate`, in training only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


def add_drop_path(tower: Any, rate: float) -> None:
    """Add stochastic depth to transformers' InternVLVisionModel, growing linearly from 0 to `rate` over its layers.

    It replaces the dropout at the end of each residual branch, a no-op in every published model. Scaling a branch
    commutes with the layer scale that follows.
    """
    layers = tower.encoder.layer
    rates = torch.linspace(0, rate, len(layers), device="cpu").tolist()
    for layer, layer_rate in zip(layers, rates, strict=True):
        layer.attention.projection_dropout = DropPath(layer_rate).train(tower.training)
        layer.dropout = DropPath(layer_rate).train(tower.training)


def _flagged(features: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """The features of the tiles whose flag is not 0. `flags` are on the host."""
    chosen = [tile for tile, flag in enumerate(flags.tolist()) if flag]
    if len(chosen) == len(features):
        return features
    return features[torch.tensor(chosen, dtype=torch.int64).to(features.device, non_blocking=True)]


@dataclass
class ChatOutput:
    """The result of one forward pass.

    Attributes:
        loss_sum: fp32 scalar, the SUM of (weighted) cross entropies over the supervised positions of this batch. Divide
            by the global sum of `weight_sum` over ranks and accumulation steps for an exact mean.
        tokens: int64 scalar tensor, supervised positions in this batch.
        weight_sum: fp32 scalar tensor, the sum of loss weights (= tokens when no weights are given).
        logits: (B, L, vocab) fp32, only with `return_logits=True`.
        token_losses: (tokens,) fp32 cross entropy of each supervised position, without weights and gradients.
    """

    loss_sum: torch.Tensor | None
    tokens: torch.Tensor | None
    weight_sum: torch.Tensor | None
    logits: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


class ChatModel(nn.Module):
    """InternVL for training; `native` is transformers' model, and parameter names are `native.` + its names."""

    native: Any  # transformers has no type hints for the parts of its models
    architecture: Architecture

    def __init__(self, native: InternVLForConditionalGeneration, architecture: Architecture) -> None:
        super().__init__()
        self.native = native
        self.architecture = architecture
        self.head_loss = HeadLoss(self.native.config.text_config.vocab_size)
        self.reset_rotary()

    @property
    def vision_tower(self) -> Any:
        """transformers' InternVLVisionModel."""
        return self.native.model.vision_tower

    @property
    def projector(self) -> Any:
        """transformers' InternVLMultiModalProjector."""
        return self.native.model.multi_modal_projector

    @property
    def language_model(self) -> Any:
        """transformers' decoder, without its head."""
        return self.native.model.language_model

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        row_starts: torch.Tensor | None = None,
        supervised: torch.Tensor | None = None,
        image_places: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> ChatOutput:
        """Loss and logits of one pass, without a key-value cache, with which rows of one sequence would see each other.

        With the last three tensors, as `collate` makes them, nothing here waits for the device, but for the rotary
        embedding of rows that are longer than its limit (`each_row_alone`).

        Args:
            input_ids: (B, L) int64.
            pixel_values: (tiles, 3, S, S), uint8 (normalised here, on the device) or float (already normalised).
            image_flags: (tiles,) 1 for a real tile, 0 for the blank tile of a text-only row, on the host; None means
                all are real.
            attention_mask: (B, L) bool, True on real tokens; None when nothing is padded.
            position_ids: (B, L); reset to 0 at the start of each row of a flat batch.
            labels: (B, L) int64, -100 where nothing is supervised; unshifted.
            loss_weights: (B, L) fp32 weight of each label's cross entropy.
            row_starts: (rows + 1,) int32 on the host: where the rows of a flat batch (B = 1) begin, and its length.
            supervised: (S,) int64 positions of the flattened batch whose next token is supervised; None finds them.
            image_places: (C,) int64 positions of the flattened batch with `<IMG_CONTEXT>`; None finds them.
            return_logits: also compute logits at every position.

        Raises:
            ValueError: the number of `<IMG_CONTEXT>` tokens differs from what the tiles need.
        """
        embeddings = self.embed(input_ids, pixel_values, image_flags, image_places)
        if row_starts is None:
            hidden = self._decode(embeddings, position_ids, attention_mask=attention_mask)
        else:
            rows = Rows.of(row_starts, input_ids.device)
            with each_row_alone(self.language_model.rotary_emb, rows.lengths):
                arguments = flat_arguments(self.native.config.text_config._attn_implementation, rows)
                hidden = self._decode(embeddings, position_ids, **arguments)
        output = ChatOutput(None, None, None)
        if return_logits:
            output.logits = self.native.lm_head(hidden).float()
        if labels is not None:
            if supervised is None:
                ahead = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
                supervised = (ahead != IGNORED).flatten().nonzero()[:, 0]
            self._add_loss(output, hidden, labels, loss_weights, supervised)
        return output

    def _decode(self, embeddings: torch.Tensor, position_ids: torch.Tensor | None, **arguments: Any) -> torch.Tensor:
        """(B, L, hidden) states of the language model's last layer."""
        hidden: torch.Tensor = self.language_model(
            inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, **arguments
        ).last_hidden_state
        return hidden

    def _add_loss(
        self,
        output: ChatOutput,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        loss_weights: torch.Tensor | None,
        supervised: torch.Tensor,
    ) -> None:
        """Add the fp32 cross entropy of the positions whose next token is supervised."""
        following = supervised + 1
        if loss_weights is None:
            weights = torch.ones(len(supervised), device=hidden.device)
        else:
            weights = loss_weights.flatten()[following]
        output.loss_sum, output.token_losses = self.head_loss.compute(
            self.native.lm_head, hidden.flatten(0, 1)[supervised], labels.flatten()[following], weights
        )
        output.tokens = torch.full((), len(supervised), dtype=torch.int64, device=hidden.device)
        output.weight_sum = weights.sum()

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        image_places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, hidden) token embeddings with tile features in place of the `<IMG_CONTEXT>` tokens.

        A batch without tiles runs one blank tile through the vision tower and drops its features, so that every rank
        runs the same modules and has gradients for the same parameters. Otherwise ZeRO hangs (stage 3) or aborts
        (stage 1).
        """
        embeddings: torch.Tensor = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is None or len(pixel_values) == 0:
            pixel_values, image_flags = self._blank_tile(input_ids.device)
        features = self.encode_tiles(pixel_values)
        if image_flags is not None:
            features = _flagged(features, image_flags)
        features = features.flatten(0, 1).to(embeddings.dtype)
        if image_places is None:
            image_places = (input_ids == self.native.config.image_token_id).flatten().nonzero()[:, 0]
        if len(image_places) != len(features):
            raise ValueError(
                f"the batch has {len(image_places)} <IMG_CONTEXT> tokens but its tiles give {len(features)} features; "
                f"was a row cut in the middle of an image?"
            )
        return embeddings.flatten(0, 1).index_copy(0, image_places, features).view_as(embeddings)

    def _blank_tile(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = self.native.config.vision_config.image_size
        return torch.zeros(1, 3, height, width, device=device), torch.zeros(1, dtype=torch.long)

    def encode_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, context tokens, language hidden) features of tiles."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise_tiles(pixel_values)
        tower = self.vision_tower
        hidden = tower.embeddings(pixel_values)
        layers = tower.encoder.layer
        # Hidden state 0 is the embeddings, so -1 is the output of the last layer.
        index = self.architecture.select_layer
        count = index if index >= 0 else len(layers) + 1 + index
        for layer in layers[:count]:
            hidden = layer(hidden)
        if count == len(layers):
            hidden = tower.layernorm(hidden)
        features: torch.Tensor = self.projector(self._pixel_shuffle(hidden[:, 1:]))
        return features

    def _pixel_shuffle(self, patches: torch.Tensor) -> torch.Tensor:
        """(tiles, patches, C) to (tiles, context tokens, C / ratio squared)."""
        side = int(patches.shape[1] ** 0.5)
        grid = patches.reshape(len(patches), side, side, -1)
        shuffled: torch.Tensor = self.native.model.pixel_shuffle(grid, scale_factor=self.native.config.downsample_ratio)
        if self.architecture.pixel_shuffle_version == "v1":  # v1 does not swap height and width back
            shuffled = shuffled.transpose(1, 2)
        return shuffled.flatten(1, 2)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """(B, new tokens) int64 ids for prompts padded on the left; `settings` are those of transformers' generate."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings = self.embed(input_ids, pixel_values, image_flags)
        new: torch.Tensor = self.native.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **settings)
        return new

    def set_drop_path(self, rate: float) -> None:
        """Add stochastic depth to the vision tower, growing linearly from 0 to `rate` over the layers."""
        add_drop_path(self.vision_tower, rate)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Choose whether both towers recompute activations in the backward pass."""
        if enabled:
            self.native.activation_checkpointing_enable({"use_reentrant": False})
            # transformers makes embeddings require gradients for re-entrant checkpointing. Here that would only make a
            # frozen vision tower keep activations and run a useless backward pass.
            self.native.disable_input_require_grads()
        else:
            self.native.activation_checkpointing_disable()

    def reset_rotary(self) -> None:
        """Recompute the rotary frequencies in fp32 on the model's device."""
        old = self.language_model.rotary_emb
        device = next(old.buffers()).device
        with torch.device("cpu"):
            fresh = type(old)(config=self.native.config.text_config)
        self.language_model.rotary_emb = fresh.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> ChatModel:
        """Keep rotary frequencies in fp32 when the weights are cast, as DeepSpeed does with module.bfloat16()."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_rotary()
        return self
