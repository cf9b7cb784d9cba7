"""What several test files build on: small models, small runs, slices, trainings, searches."""
