"""What SGLang's environment lacks on a machine without a GPU, put in place at start-up.

Set this folder on PYTHONPATH, and spawned workers have it too. torchvision's wheel brings C++ for
CUDA alone: its operators are declared here, so that it can be imported, and do not run.
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
            sys.modules["torch"]._fixpass_torchvision = self.library
        return None


sys.meta_path.insert(0, _Declare())
