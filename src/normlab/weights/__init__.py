"""Re-parametrisations of weights: one method, one file."""
