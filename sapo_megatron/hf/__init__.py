"""A model on disk: its config.json, its folder, the names of its tensors."""
