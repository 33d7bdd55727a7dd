"""Inference-time baselines: frozen dataclasses that, when called, return a context in which the model is steered."""
