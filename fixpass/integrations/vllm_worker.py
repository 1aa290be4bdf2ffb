"""The former place of `fixpass.integrations.vllm.worker`, for engines that name it."""

import warnings

from fixpass.integrations.vllm.worker import Reports

__all__ = ["Reports"]

warnings.warn(
    "fixpass.integrations.vllm_worker is deprecated: name fixpass.integrations.vllm.worker.Reports",
    DeprecationWarning,
    stacklevel=2,
)
