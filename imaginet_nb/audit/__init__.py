"""Shortcuts, duplicates and overlaps of a data set."""
