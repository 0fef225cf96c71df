"""Models on disk: where a checkpoint comes from, its tensors, and how a student is cut from it."""
