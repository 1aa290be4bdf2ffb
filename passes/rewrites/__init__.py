"""Declared rewrites, one family a file."""
