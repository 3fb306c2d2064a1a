"""The merge stage: whole models of the base and what was trained."""
