"""Rewritings of a graph that change no answer: towards the working copy, and back to the file."""
