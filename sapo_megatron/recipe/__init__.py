"""What a run is told: the keys of a recipe, how they are read, and the rules among them."""
