"""What a user chooses: the recipe, in sections, and everything that the command line and README tell of its keys."""
