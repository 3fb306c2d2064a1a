"""Models that are not chat models: InternVL 1.0 stage 2 (InternVL-14B), an image and a text encoder."""

# Name -> side of the pictures its position embeddings are made for, in pixels. Its config.json has the dimensions.
RETRIEVAL_MODELS: dict[str, int] = {"InternVL-14B-224px": 224}
