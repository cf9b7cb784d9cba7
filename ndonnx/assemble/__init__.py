"""Students in the teacher's place: splicing, sequential propagation, the checks of the whole."""
