"""Reports of a run to a tracker of experiments, sent by a child process so that no tracker can stop a stage."""
