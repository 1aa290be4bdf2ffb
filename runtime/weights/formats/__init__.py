"""One module a format: where the stored tensors of a checkpoint lie, without reading them."""
