"""Models: a hub id or a directory to a loaded model that fits in memory; no text is read here."""
