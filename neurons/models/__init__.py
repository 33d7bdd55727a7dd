"""Models: load a model from a hub id or a directory within a memory limit; no text is read here."""
