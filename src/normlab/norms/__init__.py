"""Layers that normalise activations: one method, one file."""
