"""Ablation: what a model loses without some neurons."""
