"""What every run stands on: its directory, its processes, what the machine can, and what becomes of a failure."""
