"""A run's folder: what is written there, and reading it back. Nothing here needs Megatron."""
