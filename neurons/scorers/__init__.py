"""Scorers: scores of neurons from statistics, one published method in each file, and selection by score."""
