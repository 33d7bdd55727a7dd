"""Inference-time baselines: functions that return a context in which the model is steered."""
