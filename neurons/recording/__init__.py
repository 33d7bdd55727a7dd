"""Recording: a model reads text, and what its modules compute is summed."""
