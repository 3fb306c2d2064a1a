"""The only modules that talk to the API server, as raw JSON."""
