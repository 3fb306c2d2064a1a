"""The InternVLFineTune contract: the spec that a user writes, the status, and the RunConfig that a stage reads."""
