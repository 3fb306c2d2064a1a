"""The InternVLFineTune contract: what a user writes, what the operator answers, what a stage reads."""
