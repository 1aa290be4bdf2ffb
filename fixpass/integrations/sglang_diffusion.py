"""The former place of `fixpass.integrations.sglang.diffusion`, for installed entry points."""

from fixpass.integrations.sglang.diffusion import plugin

__all__ = ["plugin"]
