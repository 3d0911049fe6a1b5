"""The Triton kernels of 4-bit experts and of a decode step, and the choice of what runs on which
device."""
