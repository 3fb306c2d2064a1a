"""InternVL 1.0 stage 2 (InternVL-14B): contrastive fine-tuning of an image and a text encoder."""

from pydantic import Field

from internvl_api.base import ApiModel

# Name -> side of the pictures its position embeddings are made for, in pixels. Its config.json has the dimensions.
RETRIEVAL_MODELS: dict[str, int] = {"InternVL-14B-224px": 224}

_WAYS = ("image_to_text", "text_to_image")
# InternVL-C compares pooled vision features with the text's, InternVL-G those of the queries.
RETRIEVAL_METRICS = tuple(f"{model}_{way}_R{k}" for model in ("C", "G") for way in _WAYS for k in (1, 5, 10))


class Retrieval(ApiModel):
    """Settings that only contrastive training has. RECIPE."""

    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Learning rate of a layer: this to the power of its depth below the top (VIT_LAYER_DECAY_RATE and "
        "QLLAMA_LAYER_DECAY_RATE of upstream's scripts)",
    )
    hard_negatives: bool = Field(
        False,
        description="Match each picture with a text of another in the same forward, likelier the more alike, instead "
        "of a random one",
    )
