"""Recipes: named defaults for a spec, what they resolve to, and summaries of them."""
