"""Pipeline: the whole job from one recipe."""
