"""The demo's pieces: data, images, following a run, checking its result. The end-to-end tests use them too."""
