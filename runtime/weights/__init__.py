"""Weights: their layouts, folds in place, updates that are whole or not at all."""
