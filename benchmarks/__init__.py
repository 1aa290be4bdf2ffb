"""Benchmarks of fixpass: ratios of things measured side by side in one run.

`python -m benchmarks` runs them; each writes its numbers as JSON and as a table. Nothing here is
installed, and no absolute time is promised: machines differ, ratios in one run less so.
"""
