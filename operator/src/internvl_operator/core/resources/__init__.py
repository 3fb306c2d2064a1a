"""Pure builders of the children, one kind a file; every name comes from `names`."""
