"""The published models: names, kinds, dimensions."""
