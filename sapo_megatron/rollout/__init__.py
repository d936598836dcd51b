"""Where samples and rewards come from."""
