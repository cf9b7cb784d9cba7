"""Measurements and the scripts behind the shipped assets; not part of the installed package."""
