"""Main loops of the compiled kernels: the simulation of loops whose share is known, and the kernels' bounds."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, TRITONS, python

from benchmarks.kernels import sass
from lorasb.compat.triton import installed

NONE = 7 << 5 | 7 << 8  # control code: no barrier is written
MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def listing(*code: tuple[str, int]) -> str:
    """Return what cuobjdump prints for instructions with control codes, and for a branch back to the first one."""
    lines = []
    for i, (text, control) in enumerate([*code, ("@!P0 BRA 0x0", NONE | 1)]):
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;         /* 0x{i:016x} */")
        lines.append(f"                                           /* 0x{control << 41:016x} */")
    return "\n".join(lines)


def loop_of(*code: tuple[str, int]) -> sass.Code:
    return sass.main_loop(sass.instructions(listing(*code)))


def share(loop: sass.Code, warps: int = 4, programs: int = 1, policy: str = sass.POLICIES[0]) -> float:
    return sass.tensor_share(loop, warps, programs, mma_cycles=16, policy=policy)


def test_control_codes_are_read() -> None:
    control = 9 | 3 << 5 | 4 << 8 | 0b100001 << 11
    one, branch = sass.instructions(listing(("@P1 LDSM.16.M88.4 R20, [R2]", control)))
    assert (one.opcode, one.kind, one.wavefronts) == ("LDSM.16.M88.4", "LDSM", 4)
    assert (one.stall, one.write_barrier, one.read_barrier, one.waits_for) == (9, 3, 4, (0, 5))
    assert (branch.opcode, branch.address) == ("BRA", 16)


def test_the_main_loop_is_the_one_of_16_bits() -> None:
    """The unrolled TF32 product with R does not count."""
    tf32 = [("HMMA.1688.F32.TF32 R4, R8, R12, R4", NONE | 2)] * 8
    first = listing(*tf32)
    second = listing((MMA, NONE | 2)).replace("/*0", "/*1").replace("BRA 0x0", "BRA 0x1000")
    assert next(one.opcode for one in sass.main_loop(sass.instructions(f"{first}\n{second}"))) == MMA.split()[0]


@pytest.mark.parametrize("policy", sass.POLICIES)
def test_shares_that_can_be_counted(policy: str) -> None:
    full = loop_of(*[(MMA, NONE | 2)] * 8)
    assert share(full, policy=policy) == 1.0
    # one warp per scheduler, which waits 31 cycles after each MMA, plus 1 for the branch: busy for 16 of 32
    alone = loop_of((MMA, NONE | 15), ("NOP", NONE | 15), ("NOP", NONE | 1))
    assert share(alone, policy=policy) == pytest.approx(0.5, abs=0.02)
    # a second program's warps fill the gaps
    assert share(alone, programs=2, policy=policy) == pytest.approx(1.0, abs=0.05)


def test_a_load_is_waited_for() -> None:
    """An MMA that waits for LDSM's barrier starts later, by `SHARED_LATENCY` and LDSM's wavefronts."""
    load = ("LDSM.16.M88.4 R20, [R2]", 1 | 0 << 5 | 7 << 8)
    waiting = loop_of(load, (MMA, NONE | 1 | 1 << 11))
    period = sass.SHARED_LATENCY + 4 + 2  # 4 for wavefronts, 2 to issue the MMA and the branch
    assert share(waiting) == pytest.approx(16 / period, abs=0.02)
    assert share(loop_of(load, (MMA, NONE | 1))) == 1.0  # without the wait


def test_warps_of_a_program_meet_at_a_barrier() -> None:
    free = loop_of((MMA, NONE | 1))
    meeting = loop_of((MMA, NONE | 1), ("BAR.SYNC.DEFER_BLOCKING 0x0", NONE | 1))
    assert share(free) == 1.0
    assert 16 / share(meeting) == pytest.approx(16 + sass.BARRIER_LATENCY, abs=8)


# Kernel -> architecture -> the lowest bound allowed for its configurations under both policies, at the layer and tokens
# of `main_loops`, with Triton 3.8 or later.
BOUNDS = {
    "extended_gemm": {"sm_80": 0.88, "sm_86": 0.97, "sm_89": 0.97, "sm_120": 0.92},
    "extended_gemm backward": {"sm_80": 0.78, "sm_86": 0.95, "sm_89": 0.95, "sm_120": 0.92},
    "grad_sign": {"sm_80": 0.75, "sm_86": 0.97, "sm_89": 0.97, "sm_120": 0.95},
}
LEAST = {(kernel, arch): least for kernel, row in BOUNDS.items() for arch, least in row.items()}
# Triton 3.6 and 3.7 do not prefetch: cuBLAS multiplies there, unless first calls on a GPU find these kernels faster.
OLDER_BOUNDS = {
    "extended_gemm": {"sm_80": 0.74, "sm_86": 0.92},
    "extended_gemm backward": {"sm_80": 0.63, "sm_86": 0.85},
    "grad_sign": {"sm_80": 0.59, "sm_86": 0.77},
}
GRADIENT_KERNELS = 3  # for the last call of a sum, an earlier one, and a single one
MOST_TMA_INSTRUCTIONS = 12  # per 64x128x16; the extended GEMM has 31 forward, CUTLASS 6


def measured(*archs: str, **environment: str) -> dict[str, Any]:
    command = ("-m", "benchmarks.kernels.main_loops", "--json", *(word for arch in archs for word in ("--arch", arch)))
    found: dict[str, Any] = json.loads(python(*command, TRITON_INTERPRET="0", **environment))
    return found


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return measured("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


prefetching = pytest.mark.skipif(
    installed() < (3, 8), reason="Triton 3.6 and 3.7 do not prefetch: cuBLAS multiplies there"
)


def without_dropout(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["variant"] in ("default", "gradient")]


@pytest.mark.long
@prefetching
@pytest.mark.parametrize(("kernel", "arch"), LEAST)
def test_no_main_loop_got_slower(kernel: str, arch: str, report: dict[str, Any]) -> None:
    check_bounds(report, kernel, arch, LEAST[kernel, arch])


def check_bounds(report: dict[str, Any], kernel: str, arch: str, least: float) -> None:
    bounds = [row["bound"] for row in without_dropout(report) if (row["kernel"], row["arch"]) == (kernel, arch)]
    assert len(bounds) == (GRADIENT_KERNELS if kernel == "grad_sign" else 1)
    assert min(map(min, bounds)) >= least


@pytest.mark.long
@pytest.mark.parametrize("triton", [path for path in TRITONS if path.name < "3.8"], ids=lambda path: path.name)
def test_no_main_loop_of_an_older_triton_got_slower(triton: Path) -> None:
    found = measured("sm_80", "sm_86", PYTHONPATH=f"{triton}:{ROOT}")
    assert found["triton"] == triton.name
    for kernel, row in OLDER_BOUNDS.items():
        for arch, least in row.items():
            check_bounds(found, kernel, arch, least)


@pytest.mark.long
@prefetching
def test_dropout_does_not_slow_the_backward_of_a_layer(report: dict[str, Any]) -> None:
    masked = "extended_gemm backward", "dropout"
    bounds = [row["bound"] for row in report["rows"] if (row["kernel"], row["variant"]) == masked]
    assert max(map(min, bounds)) >= 0.94  # a layer's kernel; the other adds to cuBLAS' result


@pytest.mark.long
@prefetching
def test_products_by_tma_have_few_instructions(report: dict[str, Any]) -> None:
    counts = [row["per_mma"] for row in without_dropout(report) if row["kernel"].startswith("tma_gemm")]
    assert len(counts) == 2
    assert max(counts) <= MOST_TMA_INSTRUCTIONS


@pytest.mark.long
@prefetching
def test_every_element_of_w_is_loaded_once(report: dict[str, Any]) -> None:
    """As in CUTLASS, each of four warps loads a quarter; dropout's smaller tiles are not compared."""
    rows = [row for row in without_dropout(report) if row["kernel"].startswith("extended_gemm") and row["bound"]]
    assert {row["ldsm_per_mma"] for row in rows} == {0.25}


@pytest.mark.long
def test_the_report_has_cutlass_too(report: dict[str, Any]) -> None:
    assert {row["arch"] for row in report["peer"]} == {"sm_80", "sm_86", "sm_90"}
    assert all(0 < share <= 1 for row in [*report["rows"], *report["peer"]] for share in row["bound"])
