"""What upstream's training does with a row and with a batch, written anew as the reference of benches.

Sources: OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py (build_transform, dynamic_preprocess,
preprocess_mpt, concat_pad_data_collator) and internvl/model/internvl_chat/modeling_internvl_chat.py (forward).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import cast

import numpy as np
import torch
from internvl_trainer.data.row_schema import Turn
from internvl_trainer.data.sample import Sample
from internvl_trainer.data.tokenize import TEMPLATES, image_tokens, with_system_turn
from internvl_trainer.data.upstream_labels import label_like_upstream
from internvl_trainer.model.chat_model import IMAGENET_MEAN, IMAGENET_STD, ChatModel
from padded import pad_rows
from PIL import Image
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_python import Trie

MEAN, STD = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))


def make_row(
    data: bytes,
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    size: int,
    most_tiles: int,
    context_tokens: int,
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(tiles, 3, S, S) normalised fp32 tiles, ids and labels of a row with one picture."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    tiles = torch.stack([_transform(tile, size) for tile in _cut(picture, size, most_tiles)])
    style = TEMPLATES[template]
    text = "".join(
        style.open_turn(turn.role) + turn.text + style.end for turn in with_system_turn(list(turns), style)
    ).replace("<image>", image_tokens(len(tiles), context_tokens), 1)
    python = PythonTokenizer(tokenizer)
    ids = np.array(python(text)["input_ids"], np.int64)
    return tiles, ids, label_like_upstream(text, ids, cast(PreTrainedTokenizerBase, python), style, None)


class PythonTokenizer:
    """Tokenizes as transformers' tokenizers in Python do, such as the LlamaTokenizer of upstream's training script.

    Only what lies between two special tokens goes to the tokenizer in Rust, which is faster than Python's there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad_token_id, self._tokenizer = tokenizer.pad_token_id, tokenizer
        self._trie, self._special = _special_tokens(tokenizer)

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids: list[int] = []
        for piece in self._trie.split(text):
            if piece in self._special:
                ids.append(self._special[piece])
            else:
                ids += self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids}


@cache
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Trie, dict[str, int]]:
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return Trie(special), special


def _cut(picture: Image.Image, size: int, most: int) -> list[Image.Image]:
    """The picture resized to the grid nearest in aspect ratio, cut tile by tile, and a thumbnail."""
    width, height = picture.size
    shapes = {
        (columns, rows)
        for count in range(1, most + 1)
        for columns in range(1, count + 1)
        for rows in range(1, count + 1)
        if 1 <= columns * rows <= most
    }
    columns, rows = min(
        sorted(shapes, key=lambda shape: shape[0] * shape[1]),
        key=lambda shape: abs(width / height - shape[0] / shape[1]),
    )
    resized = picture.resize((size * columns, size * rows))
    boxes = [
        (column * size, row * size, (column + 1) * size, (row + 1) * size)
        for row in range(rows)
        for column in range(columns)
    ]
    tiles = [resized.crop(box) for box in boxes]
    return [*tiles, picture.resize((size, size))] if len(tiles) > 1 else tiles


def _transform(tile: Image.Image, size: int) -> torch.Tensor:
    """As torchvision's Resize, ToTensor and Normalize."""
    if tile.size != (size, size):
        tile = tile.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).clone().sub_(MEAN).div_(STD)


def loss_sum(model: ChatModel, samples: Sequence[Sample]) -> torch.Tensor:
    """The summed loss of rows, each padded to the longest, from all logits of all positions in fp32."""
    batch = {name: tensor.to(model.native.device) for name, tensor in pad_rows(samples).items()}
    hidden = model.language_model(
        inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"], batch["image_flags"].cpu()),
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    logits = model.native.lm_head(hidden).float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
