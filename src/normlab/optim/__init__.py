"""Optimisers, preconditioners and step hooks: one method, one file."""
