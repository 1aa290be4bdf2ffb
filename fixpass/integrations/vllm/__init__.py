"""vLLM: compiles its models with our passes, behind its own entry point and worker class.

`register` is the entry point; it imports the rest only in a process that has fixpass switched on.
"""

from fixpass.integrations.vllm.engine_config import register

__all__ = ["register"]
