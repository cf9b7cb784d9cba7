"""The kinds of tasks that ship, one a file, found by the file's name."""
