"""Models: upstream's checkpoint format, the native chat model, adapters."""
