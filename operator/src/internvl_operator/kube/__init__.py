"""Everything that talks to the API server, at the level of raw JSON."""
