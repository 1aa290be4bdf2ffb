"""What compiled code and engines call: ops, kernels, errors. It imports no compiler layer."""
