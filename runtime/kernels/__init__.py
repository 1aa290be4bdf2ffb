"""Triton kernels that read any layout; empty, so that none is imported unasked."""
