"""Figures of a model: its answers to the tasks of spec.evaluation, and what they are worth."""
