"""Real trained models from public wheels, compressed with nothing but `--data` and `--time-budget`; see `__main__`."""
