"""Run at the start of every Python that has this folder on PYTHONPATH: SGLang's workers."""

import sglang_start  # noqa: F401
