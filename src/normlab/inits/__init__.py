"""Initialisers: one method, one file."""
