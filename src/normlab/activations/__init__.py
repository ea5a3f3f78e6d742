"""Activations by element: swapped into any model, and what they do to the means behind them."""
