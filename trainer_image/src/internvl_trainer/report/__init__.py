"""What a person reads of a run: one self-contained page with its figures, and the model card."""
