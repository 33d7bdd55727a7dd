"""Recording: sums of a model's activations over text."""
