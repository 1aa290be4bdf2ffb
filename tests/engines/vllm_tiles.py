"""A linear kernel for vLLM that reads its weight in aiter's tiles, as aiter's own does on ROCm.

It takes the place of vLLM's kernel in the MLPs. The weight is shuffled in the forward, call by
call, unless something takes that out of the graph. On CPU the kernel brings the tiles back and
multiplies: slow, and right only if what it is given are tiles.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from fixpass.weights import shuffle_weight

LAYOUT = "aiter_16x16"
MLPS = ("gate_up_proj", "down_proj")


@torch.library.custom_op("fixpass_test::tiles_linear", mutates_args=())
def tiles_linear(x: Tensor, tiles: Tensor) -> Tensor:
    rows, columns = tiles.shape
    inner = 16 // tiles.element_size()
    blocks = tiles.view(rows // 16, columns // (2 * inner), 2, 16, inner)
    return linear(x, blocks.permute(0, 3, 1, 2, 4).reshape(rows, columns))


@tiles_linear.register_fake
def _(x: Tensor, tiles: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], tiles.shape[0]))


def install():
    theirs = UnquantizedLinearMethod
    apply, process = theirs.apply, theirs.process_weights_after_loading

    def is_mlp(layer):
        return getattr(layer, "prefix", "").endswith(MLPS)

    def apply_tiles(self, layer, x, bias=None):
        if not is_mlp(layer):
            return apply(self, layer, x, bias)
        return tiles_linear(x, shuffle_weight(layer.weight, LAYOUT))

    def keep_weight(self, layer):
        # vLLM's own would pack the weight for its own kernel, and leave nothing of it.
        return None if is_mlp(layer) else process(self, layer)

    theirs.apply, theirs.process_weights_after_loading = apply_tiles, keep_weight
