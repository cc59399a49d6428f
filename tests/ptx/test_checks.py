"""Every check finds a fault that is planted, and leaves the same kernel without it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx import KernelError, thread_block
from ptx.program import Program, parse_instruction
from ptx_bench import run

WORDS = np.arange(64, dtype=np.uint32)
OUT = np.zeros(64, np.uint32)
COPY = "mad.wide.u32 %rd9, %r0, 4, %rd1;\nld.global.b32 %r1, [%rd9];\nmad.wide.u32 %rd8, %r0, 4, %rd2;\nst.global.b32 [%rd8], %r1;"
TO_SHARED = "shl.b32 %r2, %r0, 2;\nmov.b32 %r3, global_smem;\nadd.s32 %r4, %r3, %r2;\nst.shared.b32 [%r4], %r0;\n"
# thread t reads what thread (t + 32) mod 64 wrote, which is another warp
FROM_OTHER = "add.s32 %r5, %r0, 32;\nand.b32 %r5, %r5, 63;\nshl.b32 %r5, %r5, 2;\nadd.s32 %r5, %r3, %r5;\nld.shared.b32 %r1, [%r5];\n"
STORE = "mad.wide.u32 %rd8, %r0, 4, %rd1;\nst.global.b32 [%rd8], %r1;"
ASYNC = "cp.async.cg.shared.global [%r4], [%rd7], 16, 16;\ncp.async.commit_group;\n"
ASYNC_HEAD = "shl.b32 %r2, %r0, 4;\nmov.b32 %r4, %r2;\nmad.wide.u32 %rd7, %r0, 16, %rd1;\n"


def fails(program: Program, arrays: list[np.ndarray], message: str, **options: object) -> None:
    with pytest.raises(KernelError, match=message):
        run(program, arrays, **options)  # type: ignore[arg-type]


def test_a_register_is_read_after_it_is_written() -> None:
    fails("add.s32 %r1, %r9, 1;\nmov.u32 %r9, 1;\n" + STORE, [OUT], "read of %r9 before it was written")


def test_a_half_that_is_never_written_is_undefined_and_shows() -> None:
    """LLVM packs what it needs with nothing: the other half's result is right, and the undefined one is all ones."""
    low, both = "mov.u32 %r2, 7;\nmov.b64 %rd7, {%r2, %r3};\n", "mov.b64 {%r1, %r4}, %rd7;\n"
    assert run(low + both + STORE, [OUT])[0][:32].tolist() == [7] * 32
    high = both.replace("%r1, %r4", "%r4, %r1")
    assert run(low + high + STORE, [OUT])[0][:32].tolist() == [2**32 - 1] * 32


def test_a_kernel_without_a_fault_copies() -> None:
    assert run(COPY, [WORDS, OUT])[1][:32].tolist() == list(range(32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (COPY.replace("[%rd9]", "[%rd9+256]"), r"global read out of bounds, 128 bytes past the end"),
        (COPY.replace("[%rd8]", "[%rd8+132]"), r"global write out of bounds, 4 bytes past the end"),
        (COPY.replace("[%rd9]", "[%rd9+-4]"), "global read out of bounds"),
        (COPY.replace("[%rd9]", "[%rd9+2]"), "misaligned global read of 4 bytes"),
        (COPY.replace("mad.wide.u32 %rd8, %r0, 4, %rd2", "mov.b64 %rd8, %rd2"), "two threads store to one address"),
        (COPY.replace("%r1;", "%r7;"), "read of %r7 before it was written"),
    ],
    ids=["past the end", "write past the end", "before the start", "misaligned", "two stores", "register"],
)
def test_global_accesses(body: str, message: str) -> None:
    fails(body, [WORDS, OUT], message)


def test_a_read_that_lies_in_padding_is_no_read_of_the_tensor() -> None:
    """Vectors of 16 bytes over a tensor of 4 elements more than whole vectors: 8 bytes too many."""
    body = "mad.wide.u32 %rd9, %r0, 16, %rd1;\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd9];"
    run(body, [np.zeros(128, np.uint32)])
    fails(body, [np.zeros(126, np.uint32)], "8 bytes past the end")


def test_bytes_that_nobody_wrote() -> None:
    body = COPY + "\nld.global.b32 %r1, [%rd8];"
    run(body, [WORDS, OUT], fresh=[1])  # its own stores came first
    fails(COPY, [WORDS, OUT], "read of global memory that nobody wrote", fresh=[0])
    fails("mov.b32 %r9, 0;\nld.shared.b32 %r1, [%r9];", [], "shared memory that nobody wrote")


def test_warps_need_a_barrier_between_them() -> None:
    good = TO_SHARED + "bar.sync 0;\n" + FROM_OTHER + STORE
    assert run(good, [OUT], threads=64)[0].tolist() == [(t + 32) % 64 for t in range(64)]
    fails(TO_SHARED + FROM_OTHER + STORE, [OUT], "shared race: read of what another warp wrote", threads=64)
    again = TO_SHARED + "bar.sync 0;\n" + FROM_OTHER + "{barrier}st.shared.b32 [%r4], %r1;\n" + STORE
    run(again.format(barrier="bar.sync 0;\n"), [OUT], threads=64)
    fails(again.format(barrier=""), [OUT], "write of what another warp read", threads=64)
    both = TO_SHARED + "{barrier}" + FROM_OTHER.replace("ld.shared.b32 %r1, [%r5]", "st.shared.b32 [%r5], %r0")
    run(both.format(barrier="bar.sync 0;\n"), [OUT], threads=64)
    fails(both.format(barrier=""), [OUT], "write of what another warp wrote", threads=64)


def test_global_stores_of_a_block_need_a_barrier_too() -> None:
    body = "mad.wide.u32 %rd8, %r0, 4, %rd1;\nst.global.b32 [%rd8], %r0;\n{barrier}xor.b32 %r1, %r0, 32;\n"
    body += "mad.wide.u32 %rd9, %r1, 4, %rd1;\nld.global.b32 %r2, [%rd9];"
    run(body.format(barrier="bar.sync 0;\n"), [OUT], threads=64)
    fails(body.format(barrier=""), [OUT], "global race between warps", threads=64)


def test_shared_bounds_and_alignment() -> None:
    fails("mov.b32 %r4, 64;\nst.shared.b32 [%r4+4096], %r0;", [], "shared write out of bounds")
    fails("mov.b32 %r4, 2;\nst.shared.b32 [%r4], %r0;", [], "misaligned shared write")


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        ("cp.async.wait_group 0;\nbar.sync 0;\n", None),
        ("bar.sync 0;\n", "bytes that a cp.async is still writing"),
        ("cp.async.wait_group 1;\nbar.sync 0;\n", "bytes that a cp.async is still writing"),
        ("cp.async.wait_group 0;\n", "read of what another warp wrote since the last barrier"),
        ("", "bytes that a cp.async is still writing"),
    ],
)
def test_asynchronous_copies_are_waited_for(wait: str, message: str | None) -> None:
    """Every thread reads what the other warp's thread has copied."""
    read = "xor.b32 %r5, %r2, 512;\nld.shared.b32 %r1, [%r5];\nmad.wide.u32 %rd8, %r0, 4, %rd2;\nst.global.b32 [%rd8], %r1;"
    body, arrays = ASYNC_HEAD + ASYNC + wait + read, [np.arange(256, dtype=np.uint32), OUT]
    if message is None:
        assert run(body, arrays, threads=64)[1].tolist() == [4 * ((t + 32) % 64) for t in range(64)]
    else:
        fails(body, arrays, message, threads=64)


def test_a_copy_may_not_be_left_in_flight_or_overtaken() -> None:
    arrays = [np.arange(256, dtype=np.uint32)]
    fails(ASYNC_HEAD + ASYNC, arrays, "still in flight at the end", threads=64)
    fails(ASYNC_HEAD + ASYNC + ASYNC, arrays, "a cp.async is still writing", threads=64)
    same = ASYNC_HEAD.replace("mov.b32 %r4, %r2", "mov.b32 %r4, 0")
    fails(same + ASYNC, arrays, "two cp.async to one place", threads=64)


ARRIVE = """
setp.eq.b32 %p1, %r0, 0;
mov.u32 %r9, %ctaid.x;
mad.wide.u32 %rd8, %r9, 4, %rd1;
@%p1 st.global.b32 [%rd8], %r9;
{before}
mov.b32 %r7, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r7, [%rd2], 1;
mov.b32 %r3, global_smem;
@%p1 st.shared.b32 [%r3], %r7;
bar.sync 0;
ld.shared.b32 %r6, [%r3];
setp.ne.b32 %p2, %r6, 3;
@%p2 bra $DONE;
xor.b32 %r5, %r0, 1;
and.b32 %r5, %r5, 3;
mad.wide.u32 %rd9, %r5, 4, %rd1;
ld.global.b32 %r4, [%rd9];
@%p1 {reset}
$DONE:
"""
RESET = "st.global.b32 [%rd2], 0;"


@pytest.mark.parametrize("last", range(4))
def test_the_last_program_may_read_what_all_released(last: int) -> None:
    """Four programs write, arrive at a counter, and the last to come reads: whichever it is."""
    order = [block for block in range(4) if block != last] + [last]
    arrays = [np.zeros(4, np.uint32), np.zeros(1, np.uint32)]
    values, counter = run(ARRIVE.format(before="bar.sync 0;", reset=RESET), arrays, threads=64, blocks=4, order=order)
    assert values.tolist() == [0, 1, 2, 3]
    assert counter.tolist() == [0]


def test_programs_need_an_atomic_between_them() -> None:
    arrays = [np.zeros(4, np.uint32), np.zeros(1, np.uint32)]
    unordered = "mad.wide.u32 %rd9, %r0, 4, %rd1;\nld.global.b32 %r1, [%rd9];\nst.global.b32 [%rd9], %r1;"
    fails(unordered, [np.zeros(64, np.uint32)], "program 0 wrote, not ordered by an atomic", blocks=2)
    early = ARRIVE.format(before="", reset=RESET)  # the store is not before a barrier when the counter is raised
    fails(early, arrays, "comes after its last barrier before the atomic", blocks=4, threads=64)
    relaxed = ARRIVE.format(before="bar.sync 0;", reset=RESET).replace("acq_rel", "relaxed")
    fails(relaxed, arrays, "wrote, not ordered by an atomic", blocks=4, threads=64)


def test_threads_part_at_a_branch_and_meet_again() -> None:
    body = (
        """
setp.lt.u32 %p1, %r0, 10;
mov.b32 %r1, 5;
@%p1 bra $LOW;
mov.b32 %r1, 7;
setp.lt.u32 %p2, %r0, 20;
@%p2 bra $MEET;
add.s32 %r1, %r1, 1;
bra $MEET;
$LOW:
add.s32 %r1, %r1, 100;
$MEET:
add.s32 %r1, %r1, %r0;
"""
        + STORE
    )
    found = run(body, [OUT])[0][:32].tolist()
    assert found == [t + (105 if t < 10 else 7 if t < 20 else 8) for t in range(32)]


def test_a_loop_that_threads_leave_one_after_another() -> None:
    body = "mov.b32 %r1, 0;\n$LOOP:\nadd.s32 %r1, %r1, 2;\nsetp.lt.u32 %p1, %r1, %r0;\n@%p1 bra $LOOP;\n" + STORE
    assert run(body, [OUT])[0][:32].tolist() == [max(2, t + t % 2) for t in range(32)]


def test_what_needs_all_threads_is_refused_where_some_are_elsewhere() -> None:
    body = "setp.lt.u32 %p1, %r0, 10;\n@%p1 bra $END;\n{}\n$END:"
    fails(body.format("bar.sync 0;"), [], "an instruction of all threads where some are elsewhere")
    fails(body.format("shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"), [], "whole warps where some lanes")


def test_an_unknown_instruction_fails_with_its_line() -> None:
    fails(
        "bar.sync 0;\nvote.sync.all.pred %p1, %p2, -1;",
        [],
        r"does not know vote\.sync\.all\.pred, at `vote\.sync\.all\.pred %p1, %p2, -1`",
    )
    fails("cvt.rz.f32.f64 %f1, %r0;", [], r"does not know cvt\.rz\.f32\.f64")


def test_an_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_block, "STEPS", 1000)
    fails("$LOOP:\nbra.uni $LOOP;", [], "more than 1000 steps: an endless loop")


@pytest.mark.parametrize(
    ("text", "guard", "operands"),
    [
        ("@!%p3 ld.global.cg.v2.b32 { %r1, %r2 }, [ %rd4 + 16 ]", ("%p3", True), (("%r1", "%r2"), ("%rd4", 16))),
        ("mov.b64 %rd1, {%r1, %r2}", None, ("%rd1", ("%r1", "%r2"))),
        ("st.global.b32 [%rd2+-8], 0f3F800000", None, (("%rd2", -8), "0f3F800000")),
        ("bra.uni $L__BB0_3", None, ("$L__BB0_3",)),
    ],
)
def test_instructions_are_parsed(text: str, guard: tuple[str, bool] | None, operands: tuple[Any, ...]) -> None:
    found = parse_instruction(text)
    assert (found.guard, found.operands) == (guard, operands)


def test_text_that_is_no_kernel() -> None:
    with pytest.raises(KernelError, match="no kernel entry"):
        Program.parse(".version 8.7\n")
    with pytest.raises(KernelError, match=r"has no \.reqntid"):
        Program.parse(".visible .entry kernel()\n{\nret;\n}\n")
