"""vLLM: its models are compiled with our passes, and reloads reach weights that have a layout.

`register` is the entry point. `worker` is named by users. Modules that import vLLM are imported
only in a process that has fixpass switched on.
"""

from fixpass.integrations.vllm.engine_config import register

__all__ = ["register"]
