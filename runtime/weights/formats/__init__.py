"""One module for each format: it finds where a checkpoint's tensors lie, from headers."""
