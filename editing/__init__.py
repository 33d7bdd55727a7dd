"""Which weights change and how; the only place that writes checkpoints."""
