"""Everything that refuses a spec, as one list of violations."""
