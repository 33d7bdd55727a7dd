"""Architectures: how each family names and builds its parts, in memory and on disk; what every room reads of a model it reads through here."""
