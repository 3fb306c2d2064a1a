"""Data: from a JSONL row to the tensors of a batch."""
