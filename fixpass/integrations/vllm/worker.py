"""Calls into the workers of a vLLM engine, through `worker_extension_cls` and `collective_rpc`.

llm = LLM(..., worker_extension_cls="fixpass.integrations.vllm.worker.Reports")
print(*llm.collective_rpc("fixpass_reports"))
llm.collective_rpc("fixpass_fold", args=({"model.layers.0.mlp.down_proj.weight": "aiter_16x16"},))
"""

from collections.abc import Mapping
from typing import Any

from fixpass.backend import last_reports
from fixpass.integrations.vllm.live_reload import hook_reload
from fixpass.runtime.weights.module_hooks import set_layouts


class Reports:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def fixpass_reports(self) -> str:
        """The reports of the graphs that this worker compiled or took from a cache, as text."""
        return "\n".join(map(str, last_reports()))

    def fixpass_fold(self, layouts: Mapping[str, str]) -> None:
        """Fold parameters of this worker's model, by the names that they have in vLLM.

        The kernels that read them must want the layouts. Reloads go on in vLLM's own layout.
        Raises LayoutError for a name that is not there, and where a layout does not fit.
        """
        hook_reload()
        set_layouts(self.model_runner.get_model(), layouts)
