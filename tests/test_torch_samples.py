"""torch's own samples of norms, linear layers, views and reductions give what eager gives.

`op_db` and `module_db` are the lists with which torch tests its operators and modules. The rewritten
graphs run op by op, and verify="values" compares them with the graphs before each pass.
"""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from fixpass.testing import assert_same
from helpers.compiling import compiled_anew

_OPS = """
    nn.functional.rms_norm nn.functional.layer_norm nn.functional.group_norm native_layer_norm
    nn.functional.batch_norm nn.functional.instance_norm nn.functional.local_response_norm
    nn.functional.normalize norm linalg.norm linalg.vector_norm renorm
    nn.functional.linear nn.functional.bilinear addmm mm bmm matmul baddbmm
    view reshape permute transpose t expand as_strided slice select narrow chunk split
    split_with_sizes squeeze unsqueeze flatten unflatten unfold movedim contiguous cat
    sum mean var var_mean std std_mean amax logsumexp softmax log_softmax
"""
OPS = frozenset(_OPS.split())
_MODULES = """
    nn.BatchNorm1d nn.BatchNorm2d nn.BatchNorm3d nn.InstanceNorm1d nn.InstanceNorm2d
    nn.InstanceNorm3d nn.GroupNorm nn.LayerNorm nn.RMSNorm nn.LocalResponseNorm nn.Linear
    nn.Bilinear
"""
MODULES = frozenset(_MODULES.split())
SAMPLES = 6
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


def op_samples(name):
    """Each variant of an op with its arguments."""
    for op in op_db:
        if op.name == name:
            for sample in list(op.sample_inputs("cpu", torch.float32))[:SAMPLES]:
                yield op, (sample.input, *sample.args), sample.kwargs


def module_samples(name):
    for info in module_db:
        if info.name == name:
            found = info.module_inputs_func(info, "cpu", torch.float32, False, training=False)
            for given in list(found)[:SAMPLES]:
                made = given.constructor_input
                module = info.module_cls(*made.args, **made.kwargs).eval()
                yield module, given.forward_input.args, given.forward_input.kwargs


def function(op):
    def call(*args, **kwargs):
        return op(*args, **kwargs)

    return call


def test_torch_has_each_name():
    assert {op.name for op in op_db} >= OPS
    assert {info.name for info in module_db} >= MODULES


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_of_rewritten_graphs(name):
    count = 0
    for op, args, kwargs in op_samples(name):
        fn = function(op)
        assert_same(compiled_anew(fn, verify="values"), fn, *args, **kwargs)
        count += 1
    assert count


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_of_rewritten_graphs(name):
    count = 0
    for module, args, kwargs in module_samples(name):
        assert_same(compiled_anew(module, verify="values"), module, *args, **kwargs)
        count += 1
    assert count
