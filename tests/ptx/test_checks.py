"""Every check finds a planted fault, and accepts the same kernel without it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from small_kernels import Array, run

from benchmarks.kernels.ptx import KernelError, thread_block
from benchmarks.kernels.ptx.program import Program

ARRAYS = np.arange(256, dtype=np.uint32), np.zeros(64, np.uint32)  # read and written by 64 threads
BARRIER, SYNC = "bar.sync 0;\n", "SYNC\n"  # SYNC: where a barrier is required
STORE = "mad.wide.u32 %rd8, %r0, 4, %rd2;\nst.global.b32 [%rd8], %r1;\n"
COPY = "mad.wide.u32 %rd9, %r0, 4, %rd1;\nld.global.b32 %r1, [%rd9];\n" + STORE
TO_SHARED = "shl.b32 %r2, %r0, 2;\nmov.b32 %r3, global_smem;\nadd.s32 %r4, %r3, %r2;\nst.shared.b32 [%r4], %r0;\n"
FROM_OTHER = "xor.b32 %r5, %r4, 128;\nld.shared.b32 %r1, [%r5];\n"  # what the same lane of the other warp wrote
GLOBAL_FROM_OTHER = "xor.b32 %r5, %r0, 32;\nmad.wide.u32 %rd9, %r5, 4, %rd2;\nld.global.b32 %r6, [%rd9];\n"
ASYNC_HEAD = "shl.b32 %r4, %r0, 4;\nmad.wide.u32 %rd7, %r0, 16, %rd1;\n"
ASYNC = "cp.async.cg.shared.global [%r4], [%rd7], 16, 16;\ncp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"
COPIED = ASYNC_HEAD + ASYNC + WAIT + BARRIER + FROM_OTHER.replace("128", "512") + STORE
SOME = "setp.lt.u32 %p1, %r0, 10;\n@%p1 bra $END;\n{}\n$END:"


def stored(body: str, **options: Any) -> list[int]:
    return run(body, ARRAYS, **{"threads": 64} | options)[1].tolist()


def fails(body: str, message: str, arrays: Sequence[Array] = ARRAYS, **options: Any) -> None:
    with pytest.raises(KernelError, match=message):
        run(body, arrays, **{"threads": 64} | options)


def test_kernels_without_a_fault_copy() -> None:
    assert stored(COPY) == list(range(64))
    assert stored(TO_SHARED + BARRIER + FROM_OTHER + STORE) == [t ^ 32 for t in range(64)]
    assert stored(COPIED) == [4 * (t ^ 32) for t in range(64)]


FAULTS = {
    "past the end": (COPY.replace("[%rd9]", "[%rd9+896]"), "global read out of bounds, 128 bytes past the end"),
    "write past the end": (COPY.replace("[%rd8]", "[%rd8+4]"), "global write out of bounds, 4 bytes past the end"),
    "before the start": (COPY.replace("[%rd9]", "[%rd9+-4]"), "global read out of bounds"),
    "misaligned": (COPY.replace("[%rd9]", "[%rd9+2]"), "misaligned global read of 4 bytes"),
    "two stores": (COPY.replace("mad.wide.u32 %rd8, %r0, 4,", "mov.b64 %rd8,"), "two threads store to one address"),
    "register": (COPY.replace("%r1;", "%r7;") + "mov.u32 %r7, 1;", "read of %r7 before it was written"),
    "unwritten": ("mov.b32 %r9, 0;\nld.shared.b32 %r1, [%r9];", "shared memory that nobody wrote"),
    "past the end of shared": ("mov.b32 %r4, 64;\nst.shared.b32 [%r4+4096], %r0;", "shared write out of bounds"),
    "misaligned in shared": ("mov.b32 %r4, 2;\nst.shared.b32 [%r4], %r0;", "misaligned shared write"),
    "no wait": (COPIED.replace(WAIT, ""), "bytes that a cp.async is still writing"),
    "weak wait": (COPIED.replace(WAIT, WAIT.replace("0", "1")), "bytes that a cp.async is still writing"),
    "no wait or barrier": (COPIED.replace(WAIT + BARRIER, ""), "bytes that a cp.async is still writing"),
    "wait alone": (COPIED.replace(BARRIER, ""), "read of what another warp wrote since the last barrier"),
    "copy in flight": (ASYNC_HEAD + ASYNC, "still in flight at the end"),
    "copy onto a copy": (ASYNC_HEAD + ASYNC * 2, "a cp.async is still writing"),
    "copies to one place": (ASYNC_HEAD + "mov.b32 %r4, 0;\n" + ASYNC, "two cp.async to one place"),
    "barrier of some": (SOME.format(BARRIER), "an instruction of all threads where some are elsewhere"),
    "shuffle of some": (SOME.format("shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"), "whole warps where some lanes"),
    "unknown": (
        BARRIER + "vote.sync.all.pred %p1, %p2, -1;",
        r"does not know vote\.sync\.all\.pred, at `vote\.sync\.all\.pred %p1, %p2, -1`",
    ),
    "unknown conversion": ("cvt.rz.f32.f64 %f1, %r0;", r"does not know cvt\.rz\.f32\.f64"),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(body: str, message: str) -> None:
    fails(body, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (TO_SHARED + SYNC + FROM_OTHER, "shared race: read of what another warp wrote"),
        (TO_SHARED + BARRIER + FROM_OTHER + SYNC + "st.shared.b32 [%r4], %r1;", "write of what another warp read"),
        (TO_SHARED + SYNC + "xor.b32 %r5, %r4, 128;\nst.shared.b32 [%r5], %r0;", "write of what another warp wrote"),
        ("mov.b32 %r1, %r0;\n" + STORE + SYNC + GLOBAL_FROM_OTHER, "global race between warps"),
    ],
    ids=["read after write", "write after read", "write after write", "global"],
)
def test_warps_need_a_barrier_between_them(body: str, message: str) -> None:
    stored(body.replace(SYNC, BARRIER))
    fails(body.replace(SYNC, ""), message)


def test_a_half_that_is_never_written_is_undefined_and_shows() -> None:
    """LLVM packs a value with an undefined half: the value's half is right, and the undefined half is all ones."""
    body = "mov.u32 %r2, 7;\nmov.b64 %rd7, {%r2, %r3};\nmov.b64 {%r1, %r4}, %rd7;\n" + STORE
    assert stored(body) == [7] * 64
    assert stored(body.replace("%r1, %r4", "%r4, %r1")) == [2**32 - 1] * 64


def test_a_read_that_lies_in_padding_is_no_read_of_the_tensor() -> None:
    """16-byte vectors over a tensor that is two elements short of full vectors read 8 bytes too many."""
    body = "mad.wide.u32 %rd9, %r0, 16, %rd1;\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd9];"
    run(body, ARRAYS, threads=64)
    fails(body, "8 bytes past the end", [ARRAYS[0][:-2]])


ARRIVE = """
setp.eq.b32 %p1, %r0, 0;
mov.u32 %r9, %ctaid.x;
mad.wide.u32 %rd8, %r9, 4, %rd2;
@%p1 st.global.b32 [%rd8], %r9;
bar.sync 0;
mov.b32 %r7, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r7, [%rd1], 1;
mov.b32 %r3, global_smem;
@%p1 st.shared.b32 [%r3], %r7;
bar.sync 0;
ld.shared.b32 %r6, [%r3];
setp.ne.b32 %p2, %r6, 3;
@%p2 bra $DONE;
xor.b32 %r5, %r0, 1;
and.b32 %r5, %r5, 3;
mad.wide.u32 %rd9, %r5, 4, %rd2;
ld.global.b32 %r4, [%rd9];
@%p1 st.global.b32 [%rd1], 0;
$DONE:
"""


@pytest.mark.parametrize("last", range(4))
def test_the_last_program_may_read_what_all_released(last: int) -> None:
    """Four programs write and arrive at a counter; the last to arrive reads, whichever it is."""
    order = [block for block in range(4) if block != last] + [last]
    counter, values = run(ARRIVE, ARRAYS, threads=64, blocks=4, order=order)
    assert values[:4].tolist() == [0, 1, 2, 3]
    assert counter[0] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (COPY.replace("%rd1", "%rd2"), "program 0 wrote, not ordered by an atomic"),
        (ARRIVE.replace(BARRIER, "", 1), "comes after its last barrier before the atomic"),
        (ARRIVE.replace("acq_rel", "relaxed"), "wrote, not ordered by an atomic"),
    ],
    ids=["none", "store without a barrier", "relaxed"],
)
def test_programs_need_an_atomic_between_them(body: str, message: str) -> None:
    fails(body, message, blocks=4)


def test_threads_part_at_a_branch_and_meet_again() -> None:
    body = """
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
    assert stored(body + STORE) == [t + (105 if t < 10 else 7 if t < 20 else 8) for t in range(64)]


def test_a_loop_that_threads_leave_one_after_another() -> None:
    body = "mov.b32 %r1, 0;\n$LOOP:\nadd.s32 %r1, %r1, 2;\nsetp.lt.u32 %p1, %r1, %r0;\n@%p1 bra $LOOP;\n" + STORE
    assert stored(body) == [max(2, t + t % 2) for t in range(64)]


def test_an_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_block, "STEPS", 1000)
    fails("$LOOP:\nbra.uni $LOOP;", "more than 1000 steps: an endless loop")


@pytest.mark.parametrize(
    ("text", "message"),
    [(".version 8.7\n", "no kernel entry"), (".visible .entry kernel()\n{\nret;\n}\n", r"has no \.reqntid")],
)
def test_text_that_is_no_kernel(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        Program.parse(text)
