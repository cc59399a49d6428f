"""The GPU kernels without a GPU: compiler output, launches, bytes and FLOPs, and the roofline."""
