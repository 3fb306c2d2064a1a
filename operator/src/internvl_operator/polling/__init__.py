"""The only modules that talk to pods: they ask training processes for their progress."""
