"""Block sizes of the Triton kernels, chosen by measurement."""
