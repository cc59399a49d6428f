"""Every kernel compiled for every architecture: no spills, and memory suffices. `make test` compiles one representative
per kernel for two architectures (`benchmarks.kernels.static_report.jobs`), `make test-all` everything that is shipped.
"""

import json
from collections import defaultdict
from typing import Any

import pytest
from processes import python

from lorasb.kernels import plan

BRIEF = ("sm_86", "sm_90")  # their tensor cores use mma and wgmma
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB
Row = dict[str, Any]
QUANTIZED = (
    "prep_forward and dequantize",
    "prep_backward and dequantize",
    "quantized_gemm",
    "quantized_gemm backward",
    "dequantize",
)


def compiled(*options: str) -> list[Row]:
    """Return the report of a process in which Triton compiles."""
    command = ("-m", "benchmarks.kernels.static_report", "--json", *options)
    found: list[Row] = json.loads(python(*command, TRITON_INTERPRET="0"))
    return found


@pytest.fixture(scope="module")
def whole() -> list[Row]:
    """The full report: a process per architecture, each of which takes minutes."""
    return [row for arch in SHARED_LIMIT for row in compiled("--arch", arch)]


@pytest.fixture(scope="module", params=["brief", pytest.param("whole", marks=pytest.mark.long)])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The report of one representative per kernel, or the full report."""
    if request.param == "brief":
        return compiled("--brief", *(option for arch in BRIEF for option in ("--arch", arch)))
    found: list[Row] = request.getfixturevalue("whole")
    return found


def names(found: list[Row]) -> list[str]:
    return [f"{r['kernel']} ({r['variant']}, {r['dtype']}, {r['arch']}, {r['config']})" for r in found]


def test_nothing_spills_and_shared_memory_fits(rows: list[Row]) -> None:
    assert names([row for row in rows if row["stack_bytes"] != 0]) == []
    assert names([row for row in rows if row["shared_bytes"] > SHARED_LIMIT[row["arch"]] * 1024]) == []
    assert names([row for row in rows if row["ctas_per_sm"] < 1]) == []


def test_the_default_extended_gemm_lets_two_programs_on_an_sm_86(rows: list[Row]) -> None:
    chosen = [
        row
        for row in rows
        if row["kernel"].startswith("extended_gemm")
        and (row["dtype"], row["arch"]) == ("bf16", "sm_86")
        and row["variant"] in ("default", "group of 3", "group of 2")
    ]
    assert {row["kernel"] for row in chosen} == {"extended_gemm", "extended_gemm backward"}
    assert names([row for row in chosen if row["ctas_per_sm"] < 2]) == []


def test_tensor_cores_are_used(rows: list[Row]) -> None:
    halves = [row for row in rows if row["dtype"] in ("bf16", "fp16") and row["kernel"] != "dequantize"]
    assert names([row for row in halves if row["mma"] == 0 or row["mma_share"] == 0.0]) == []


def test_a_weight_in_4_bits_is_decoded_in_ten_instructions(rows: list[Row]) -> None:
    decode = [row for row in rows if (row["variant"], row["arch"], row["dtype"]) == ("4 bits, decode", "sm_86", "bf16")]
    gemms = [row for row in decode if row["kernel"].startswith("quantized_gemm")]
    assert {row["kernel"] for row in gemms} == {"quantized_gemm", "quantized_gemm backward"}
    assert names([row for row in gemms if row["a_weight"] > 10]) == []


def test_a_masked_step_takes_at_most_500_instructions(rows: list[Row]) -> None:
    """For 64 x 64 elements of x and 96 ranks on sm_86."""
    masked = [row for row in rows if row["masked_step"] and (row["variant"], row["arch"]) == ("dropout", "sm_86")]
    assert masked
    assert names([row for row in masked if not 100 < row["masked_step"] <= 500]) == []


ROWS = ("times_row_cores", "row_core_gradients")
KERNELS = ("prep_forward", "prep_backward", "extended_gemm", "extended_gemm backward", "grad_sign", *ROWS, *QUANTIZED)
TMA_KERNELS = ("tma_gemm", "tma_gemm backward")


def compiled_for(found: list[Row], arch: str) -> set[tuple[str, str]]:
    """Return the (kernel, dtype) pairs compiled for an architecture."""
    return {(row["kernel"], row["dtype"]) for row in found if row["arch"] == arch}


def test_every_kernel_and_architecture_is_there(rows: list[Row], request: pytest.FixtureRequest) -> None:
    brief = request.node.callspec.params["rows"] == "brief"
    for arch in BRIEF if brief else SHARED_LIMIT:
        assert compiled_for(rows, arch) >= {(kernel, "bf16") for kernel in KERNELS}


@pytest.mark.long
def test_what_the_tables_choose_on_sm_100_has_no_tcgen05(whole: list[Row]) -> None:
    """Nothing has executed tcgen05 code."""
    assert names([row for row in whole if row["tcgen05"] and row["arch"] == "sm_100"]) == []


@pytest.mark.long
def test_every_dtype_and_shipped_configuration_is_there(whole: list[Row]) -> None:
    configs: dict[str, set[str]] = defaultdict(set)
    for row in whole:
        configs[row["arch"]].add(row["config"].partition(" ")[0])
    for arch in SHARED_LIMIT:
        by_tma = {(kernel, dtype) for kernel in TMA_KERNELS for dtype in ("bf16", "fp16") if arch == "sm_90"}
        assert compiled_for(whole, arch) == by_tma | {
            (kernel, dtype) for kernel in KERNELS for dtype in ("bf16", "fp16", "fp32")
        }
        for rule in plan.shipped_rules(arch):
            if rule.prep:
                assert f"{rule.prep.block_m}x{rule.prep.block_k}" in configs[arch]
            if rule.gemm:
                assert f"{rule.gemm.block_m}x{rule.gemm.block_n}x{rule.gemm.block_k}" in configs[arch]
