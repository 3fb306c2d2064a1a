"""Where files come from and where they go: storage, sources, cache, manifests."""
