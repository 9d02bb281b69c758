"""Triton kernels. Only ``available`` can be imported without Triton; the other modules import it."""
