"""fixpass in serving engines: one module an engine, found by the engine's own plugin mechanism.

No engine is imported here, and none is needed for anything else in fixpass.
"""
