"""The GPU kernels without a GPU: what the compiler makes of them, their launches, bytes and FLOPs, the roofline."""
