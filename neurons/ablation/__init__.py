"""Ablation: the rise of a model's loss without given neurons."""
