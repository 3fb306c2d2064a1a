"""What follows from what was observed: one policy, one file, one table test."""
