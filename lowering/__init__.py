"""What kernels ask and what targets have: layouts, contracts, targets, and how ops are lowered."""
