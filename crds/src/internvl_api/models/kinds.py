"""The two kinds of models: chat models, and retrieval models (InternVL 1.0 stage 2, an image and a text encoder)."""

from typing import Literal

ModelKind = Literal["chat", "retrieval"]

# Name -> side in pixels of the images that its position embeddings are made for.
RETRIEVAL_MODELS: dict[str, int] = {"InternVL-14B-224px": 224}
