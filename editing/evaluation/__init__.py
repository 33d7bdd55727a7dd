"""Evaluation: the text that a model writes and the likelihood that it assigns, unedited and steered."""
