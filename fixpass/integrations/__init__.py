"""Adapters for engines, one a file. Importing this package imports no engine."""
