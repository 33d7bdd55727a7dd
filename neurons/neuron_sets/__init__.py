"""Neuron sets: identify, compare, convert, plot and report the neurons of each language."""
