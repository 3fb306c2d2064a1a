"""The demo's pieces: its data, its images, following a run, and checking the result; the end-to-end tests use them too."""
