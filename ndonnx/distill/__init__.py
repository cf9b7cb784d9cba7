"""Training of student slices, and of whole students, against the teacher's activations."""
