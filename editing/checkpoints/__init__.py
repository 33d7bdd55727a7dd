"""Checkpoints: bytes of a model on disk, copied, edited, compared, undone; nothing is computed by a model here."""
