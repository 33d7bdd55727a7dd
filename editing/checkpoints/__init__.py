"""Checkpoints on disk: copy, edit, compare, undo; no model runs here."""
