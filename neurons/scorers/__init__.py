"""Scorers: statistics to scores of neurons, a published method a file, and how neurons are chosen by them."""
