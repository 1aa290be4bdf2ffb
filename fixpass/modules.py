"""Look through wrappers for a module and its attributes; which keywords a function takes."""

from fixpass.integrations.sglang.step_kwargs import AcceptedKwargs, accepted_kwargs
from fixpass.runtime.modules import find_attr, unwrapped

__all__ = ["AcceptedKwargs", "accepted_kwargs", "find_attr", "unwrapped"]
