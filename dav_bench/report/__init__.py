"""Boards: pure functions from the files of runs to tables."""
