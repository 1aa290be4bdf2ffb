"""Checkpoints into parameters: what is stored, where it goes, and a report of both.

sources open a checkpoint, mapping says which parameter takes a stored tensor, plan checks all of
it before a byte of the model changes, read moves the bytes, loader ties them together.
"""
