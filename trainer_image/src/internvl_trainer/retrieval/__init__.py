"""InternVL 1.0 stage 2 (InternVL-14B-224px): image-text retrieval and captioning.

Rows: `caption_files` reads and checks them, `pair_checks` checks their images and tokens, `pair_batch` and
`pair_dataset` make batches. Model: `architecture` reads config.json, `attention` and `qllama` add what transformers
lacks, `model` joins the parts, `losses` are the training losses, `load` reads upstream's checkpoint layout. Training:
`methods` chooses the parameters that learn, `layer_decay` their learning rates. Evaluation: `recall`.
"""
