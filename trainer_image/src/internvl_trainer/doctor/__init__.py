"""Measures a machine and says what would make a run on it fail or slow."""
