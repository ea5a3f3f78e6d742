"""Noise that regularises: dropout and its kin, one method a file."""
