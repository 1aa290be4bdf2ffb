"""What tests and benchmarks ask vLLM's workers, and how they change vLLM where a variable says so.

`FIXPASS_TEST_GLOO=1`: no shared memory of its own. `FIXPASS_TEST_TILES=1`: MLPs whose kernel reads
weights in tiles. `FIXPASS_TEST_RAW=1`: reloads that know nothing of folds.
`FIXPASS_TEST_QUANTISED_OP=1`: a norm of vLLM's that quantises, which CPU has not; a call raises. It is
imported in each worker before its groups are made.
"""

import os

import torch
import vllm_tiles
from torch._dynamo.utils import counters
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.layernorm import RMSNorm

from fixpass.backend import last_reports
from fixpass.integrations.vllm import live_reload
from fixpass.integrations.vllm.worker import Reports
from fixpass.weights import census, layout_of

if os.environ.get("FIXPASS_TEST_GLOO") == "1":
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
if os.environ.get("FIXPASS_TEST_TILES") == "1":
    vllm_tiles.install()
if os.environ.get("FIXPASS_TEST_RAW") == "1":
    live_reload.HOOKS = ()
if os.environ.get("FIXPASS_TEST_QUANTISED_OP") == "1":
    # An op lives as long as its library.
    LIBRARY = torch.library.Library("_C", "FRAGMENT")
    LIBRARY.define(
        "rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, "
        "Tensor! scale, float epsilon, Tensor? scale_ub, Tensor!? residual) -> ()"
    )


class Extension(Reports):
    def test_counters(self):
        names = ("aot_autograd", "inductor")
        return {f"{name} {k}": v for name in names for k, v in counters[name].items()}

    def test_remarks(self):
        remarks = [remark for report in last_reports() for remark in report.remarks]
        return [(remark.pass_name, remark.kind, remark.where) for remark in remarks]

    def test_folded(self):
        params = self.model_runner.get_model().named_parameters()
        return [name for name, param in params if layout_of(param) is not None]

    def test_census(self):
        """Take a census; the names of tensors that have become stale since the last one.

        A copy of a norm's weight, which nothing refreshes, shows that the census sees the model.
        """
        model, before = self.model_runner.get_model(), vars(self).get("census")
        if before is None:
            model.kept = model.model.norm.weight.detach().clone()
        self.census = census(model)
        stale = () if before is None else self.census.stale_since(before)
        return [entry.names[0] for entry in stale]

    def test_norms(self):
        modules = self.model_runner.model.named_modules()
        return [name for name, module in modules if isinstance(module, RMSNorm)]
