"""What a user chooses: the recipe."""
