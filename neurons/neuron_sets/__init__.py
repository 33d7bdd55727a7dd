"""Neuron sets: which neurons belong to which language; made, compared, exchanged, drawn and explained."""
