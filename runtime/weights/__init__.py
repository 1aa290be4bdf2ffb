"""Weights of a model: layouts, loading, and updates that happen as a whole or not at all."""
