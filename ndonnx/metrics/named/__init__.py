"""The metrics that ship, one a file, found by the file's name: what `--metric NAME` takes."""
