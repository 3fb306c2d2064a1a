"""The two kinds of models: chat models, and retrieval models (InternVL 1.0 stage 2, an image and a text encoder)."""

from typing import Literal

ModelKind = Literal["chat", "retrieval"]

CAPTION_TOKENS = 80
"""Tokens that a retrieval model reads of a caption, in upstream's training and evaluation."""

# Name -> side in pixels of the images that its position embeddings are made for.
RETRIEVAL_MODELS: dict[str, int] = {"InternVL-14B-224px": 224}
