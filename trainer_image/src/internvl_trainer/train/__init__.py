"""The train stage: engine, loop, checkpoints, export."""
