"""A run from options to SavedModel: strategy, assembly, stages, callbacks, report, export."""
