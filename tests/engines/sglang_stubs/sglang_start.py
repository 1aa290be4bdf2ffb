"""What SGLang's environment lacks on a machine without a GPU, put in place before it is imported.

torchvision's wheel brings C++ for CUDA alone: its operators are declared here, so that it can be
imported; they do not run.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)


class _Declare(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first looked for, and finds nothing."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                if not torch._C._jit_get_schemas_for_operator(
                    f"torchvision::{schema.split('(')[0]}"
                ):
                    self.library.define(schema)
        return None


# The declarations live as long as the library does.
DECLARED = _Declare()
sys.meta_path.insert(0, DECLARED)
