"""Directions: from one language to another in the residual stream, one estimator in each file."""
