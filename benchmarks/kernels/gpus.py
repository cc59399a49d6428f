"""GPUs for the roofline: the throughput of each pipe, and how long a launch keeps each one busy."""

from __future__ import annotations

from dataclasses import dataclass

PHASE_BYTES, SECTOR_BYTES, SCHEDULERS = 128, 32, 4
BUSY, DRAM_BUSY, LAUNCH = 0.75, 0.85, 3e-6


@dataclass(frozen=True)
class Gpu:
    """Peaks.

    Attributes:
        name: of the card. arch: "sm_86".
        sms: multiprocessors. clock: their Hz, at which `flops` is reached.
        flops: dense bf16 FLOP/s with fp32 sums; tf32 has half of it.
        dram, l2: bytes/s. l2_size: bytes.
        share: the least share of cuBLAS's tensor-core rate that our main loops reach, by `main_loops` (Triton 3.9);
            1.0 where wgmma runs in parallel with the simulated instructions.
    """

    name: str
    arch: str
    sms: int
    clock: float
    flops: float
    dram: float
    l2: float
    l2_size: float
    share: float = 1.0

    def read(self, size: float) -> float:
        """Bytes that DRAM moves for a tensor that was just read or written: none if half of L2 holds it."""
        return 0.0 if size <= self.l2_size / 2 else size


GPUS = {
    "a6000": Gpu("RTX A6000", "sm_86", 84, 1.80e9, 154.8e12, 768e9, 2.5e12, 6e6, 0.998),
    "a100": Gpu("A100 80GB", "sm_80", 108, 1.41e9, 312e12, 2039e9, 5.0e12, 40e6),
    "4090": Gpu("RTX 4090", "sm_89", 128, 2.52e9, 165.2e12, 1008e9, 5.0e12, 72e6, 0.998),
    "h100": Gpu("H100 SXM", "sm_90", 132, 1.83e9, 989e12, 3350e9, 5.5e12, 50e6),
}
MODEL = f"""The model (no GPU was measured for this table):
 - a launch takes {LAUNCH * 1e6:.0f} us plus the time of its busiest pipe: tensor cores, issue slots ({SCHEDULERS} per
   cycle and multiprocessor) and shared memory ({PHASE_BYTES} bytes per cycle and multiprocessor) at {BUSY:.0%} of their
   peak, L2 at its peak, DRAM at {DRAM_BUSY:.0%} of its peak;
 - for our launches, tensor operations, issue slots, shared-memory wavefronts (bank conflicts included) and global
   sectors are counted by executing the compiled code: one tile for all tiles, and every sector misses L1. Issue slots
   are PTX instructions without moves, 64-bit integer ones counting twice: ptxas's own loops have from 1.0 to 1.3 times
   as many (`loop` of benchmarks.kernels.static_report);
 - DRAM moves the operands and results of a launch once; what was just read or written, and fits into half of L2, is
   not read from DRAM again;
 - our GEMM reaches the share of cuBLAS's rate that its main loops reach in simulation (benchmarks.kernels.main_loops),
   or all of it where they are not slower than CUTLASS's; on sm_90, whose wgmma is neither simulated nor measured,
   cuBLAS's rate is assumed;
 - cuBLAS, also for the bare base, is bound by tensor cores or DRAM, and thin products (256 or less on a side) also by
   L2, in tiles of 128 x 128; launches do not overlap;
 - the eager chain's scaling is applied to the [M, out] product, as PEFT does;
 - wave quantization, latencies, clocks under load and Python's time are left out;
 - without groups autograd adds the dx of siblings (in the bare model too)."""


@dataclass(frozen=True)
class Demand:
    """The load that a launch puts on the pipes.

    Attributes:
        flops: of 16-bit matrix products; tf32 ones count twice. issue_slots, shared_wavefronts: see `ptx/work.py`.
        l2, dram: bytes.
    """

    flops: float = 0
    issue_slots: float = 0
    shared_wavefronts: float = 0
    l2: float = 0
    dram: float = 0

    def pipes(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each pipe is busy, by its name."""
        cycles = gpu.sms * gpu.clock * BUSY
        return {
            "tensor": self.flops / (gpu.flops * BUSY),
            "issue": self.issue_slots / (SCHEDULERS * cycles),
            "shared": self.shared_wavefronts / cycles,
            "L2": self.l2 / gpu.l2,
            "DRAM": self.dram / (gpu.dram * DRAM_BUSY),
        }

    def limit(self, gpu: Gpu) -> str:
        """The pipe that is busy longest; "launch" if the launch itself takes longer."""
        pipes = self.pipes(gpu)
        busiest = max(pipes, key=lambda name: pipes[name])
        return busiest if pipes[busiest] > LAUNCH else "launch"

    def seconds(self, gpu: Gpu) -> float:
        """Time of the launch."""
        return max(self.pipes(gpu).values()) + LAUNCH
