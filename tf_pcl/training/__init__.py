"""A run from settings to SavedModel: strategy, callbacks, checkpoints, export, run."""
