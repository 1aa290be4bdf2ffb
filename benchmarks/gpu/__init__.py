"""Checks and measurements for one GPU; `command.py` runs the parts, each in its own process."""
