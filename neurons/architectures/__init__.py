"""Architectures: the parts of each family of models, in memory and on disk, and the hooks at their sites."""
