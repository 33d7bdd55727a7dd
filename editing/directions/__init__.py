"""Directions: from one language to another in the residual stream, an estimator a file."""
