"""Which neurons: reads models and text, never changes a model."""
