"""What tests and benchmarks ask vLLM's workers: counts of caches, and a vLLM without its own
shared memory, where `FIXPASS_TEST_GLOO=1` says so. It is imported in each worker before its groups
are made.
"""

import os

from torch._dynamo.utils import counters
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.layernorm import RMSNorm

from fixpass.backend import last_reports
from fixpass.integrations.vllm_worker import Reports

if os.environ.get("FIXPASS_TEST_GLOO") == "1":
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


class Extension(Reports):
    def test_counters(self):
        names = ("aot_autograd", "inductor")
        return {f"{name} {k}": v for name in names for k, v in counters[name].items()}

    def test_remarks(self):
        remarks = [remark for report in last_reports() for remark in report.remarks]
        return [(remark.pass_name, remark.kind, remark.where) for remark in remarks]

    def test_norms(self):
        modules = self.model_runner.model.named_modules()
        return [name for name, module in modules if isinstance(module, RMSNorm)]
