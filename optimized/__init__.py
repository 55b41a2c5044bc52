"""LinMU with Triton kernels: the public names of `linmu.reference`, the same results, less time."""
