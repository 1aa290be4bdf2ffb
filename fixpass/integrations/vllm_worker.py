"""What one can ask the workers of a vLLM engine: `worker_extension_cls`, then `collective_rpc`.

llm = LLM(..., worker_extension_cls="fixpass.integrations.vllm_worker.Reports")
print(*llm.collective_rpc("fixpass_reports"))
"""

from fixpass.backend import last_reports


class Reports:
    """Mixed into vLLM's worker class."""

    def fixpass_reports(self) -> str:
        """The reports of the graphs that this worker compiled, as text; empty from a warm cache."""
        return "\n".join(map(str, last_reports()))
