"""InternVL 1.0 stage 2 (InternVL-14B-224px): image-text retrieval and captioning.

`architecture` reads config.json; `qllama` and `pooling` are the parts that transformers does not have, and `model` puts
them together; `losses` says what training minimises; `load` reads and writes upstream's checkpoint layout; `methods`
and `layer_decay` say what learns and how fast.
"""
