"""The stages of a run, in one shape: `run(context) -> StageResult`."""
