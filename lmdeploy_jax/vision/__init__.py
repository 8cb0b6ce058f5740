"""Images: pixels as a checkpoint was trained with them, towers, projectors, placeholders, positions."""
