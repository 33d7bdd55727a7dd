"""Evaluation: what a model writes and how likely text is to it, unedited and steered."""
