"""Networks that grow while they train: one method, one file."""
