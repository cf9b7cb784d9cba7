"""The stages of a run in order: prepare, train, select, finish."""
