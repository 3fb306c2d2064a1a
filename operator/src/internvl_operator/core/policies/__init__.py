"""The rules of reconcile: one policy, one file, one table test."""
