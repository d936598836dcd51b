"""What runs beside training, never inside it."""
