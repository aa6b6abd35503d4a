"""The emulated GPU, by small programs: what it calculates, and what it does not let pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emulated_gpu import machine, numbers, ptx
from emulated_gpu.memory import FaultError, of_tensors
from strategies import few

WORD = st.integers(0, 2**32 - 1)
SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)
THREADS = 32
MODULE = """
.version 8.7
.target sm_90
.extern .shared .align 16 .b8 global_smem[];
.visible .entry some(
	.param .u64 .ptr .global .align 1 some_param_0,
	.param .u32 some_param_1
)
.reqntid THREADS
{
	.reg .pred %p<9>;
	.reg .b32 %r<30>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [some_param_0];
	ld.param.b32 %r20, [some_param_1];
	mov.u32 %r21, %tid.x;
	mad.wide.u32 %rd2, %r21, 16, %rd1;  // four words for each thread
BODY
	ret;
}
"""


def run(body: str, words: Tensor, given: int = 0, grid: tuple[int, int, int] = (1, 1, 1)) -> None:
    """Run a program on its threads' words [threads, 4], int32."""
    module = MODULE.replace("BODY", body).replace("THREADS", str(len(words)))
    program = ptx.parse(module)
    machine.launch(program, of_tensors([words]), 1024, grid, [words.data_ptr(), given])


def room() -> Tensor:
    return torch.zeros(THREADS, 4, dtype=torch.int32)


def result(instruction: str, *operands: int) -> int:
    """Let %r0 be what an instruction makes of %r1 to %r3."""
    words = room()
    for place, value in enumerate(operands):
        words[:, place] = value - 2**32 if value >= 2**31 else value
    run(
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];" + instruction + ";"
        "st.global.b32 [%rd2 + 12], {%r0};",
        words,
    )
    assert len({*words[:, 3].tolist()}) == 1
    return int(words[0, 3]) % 2**32


def signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r0, %r1, %r2", lambda a, b, c: a + b),
        ("sub.s32 %r0, %r1, -7", lambda a, b, c: a + 7),
        ("mul.lo.s32 %r0, %r1, %r2", lambda a, b, c: a * b),
        ("mad.lo.s32 %r0, %r1, %r2, %r3", lambda a, b, c: a * b + c),
        ("lop3.b32 %r0, %r1, %r2, %r3, 0xea", lambda a, b, c: a & b | c),
        ("lop3.b32 %r0, %r1, %r2, %r3, 0x96", lambda a, b, c: a ^ b ^ c),
        ("shl.b32 %r0, %r1, 5", lambda a, b, c: a << 5),
        ("shl.b32 %r0, %r1, 32", lambda a, b, c: 0),
        ("shr.u32 %r0, %r1, 5", lambda a, b, c: a >> 5),
        ("shr.s32 %r0, %r1, 40", lambda a, b, c: -1 if a >> 31 else 0),
        ("bfe.u32 %r0, %r1, 4, 3", lambda a, b, c: a >> 4 & 7),
        ("bfe.s32 %r0, %r1, 31, 1", lambda a, b, c: -(a >> 31)),
        ("prmt.b32 %r0, %r1, %r2, 0x5410U", lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16),
        ("prmt.b32 %r0, %r1, %r2, 0xBBBB", lambda a, b, c: -1 if a >> 31 else 0),
        (
            "setp.lt.s32 %p1, %r1, %r2;selp.b32 %r0, 1, 0, %p1",
            lambda a, b, c: signed(a) < signed(b),
        ),
        ("setp.lt.u32 %p1, %r1, %r2;selp.b32 %r0, 1, 0, %p1", lambda a, b, c: a < b),
        ("min.s32 %r0, %r1, %r2", lambda a, b, c: min(signed(a), signed(b))),
        (
            "cvt.s64.s32 %rd5, %r1;shr.u64 %rd5, %rd5, 32;cvt.u32.u64 %r0, %rd5",
            lambda a, b, c: -(a >> 31),
        ),
        (
            "mul.wide.s32 %rd5, %r1, %r2;shr.u64 %rd5, %rd5, 32;cvt.u32.u64 %r0, %rd5",
            lambda a, b, c: signed(a) * signed(b) >> 32,
        ),
    ],
)
@few(25)
@given(a=WORD, b=WORD, c=WORD)
def test_whole_numbers(
    instruction: str, expected: Callable[[int, int, int], int], a: int, b: int, c: int
) -> None:
    assert result(instruction, a, b, c) == expected(a, b, c) % 2**32


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def nearest(value: Fraction, digits: int) -> Fraction:
    """Round to so many binary digits, ties to even; exponents have no limit."""
    if not value:
        return value
    exponent = math.floor(math.log2(abs(value))) - digits + 1
    while abs(value) >= Fraction(2) ** (exponent + digits):
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent + digits - 1):
        exponent -= 1
    unit = Fraction(2) ** exponent
    return round(value / unit) * unit


ORDINARY = st.floats(2.0**-30, 2.0**30, width=32) | st.floats(-(2.0**30), -(2.0**-30), width=32)


@given(ORDINARY, ORDINARY, ORDINARY)
def test_floats_are_rounded_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = result("fma.rn.f32 %r0, %r1, %r2, %r3", bits_of(a), bits_of(b), bits_of(c))
    assert Fraction(float(np.uint32(found).view(np.float32))) == nearest(exact, 24)
    given = [numbers.rounded(np.array([each]), "bf16") for each in (a, b, c)]
    narrow = [Fraction(float(numbers.real(each, "bf16")[0])) for each in given]
    exact = narrow[0] * narrow[1] + narrow[2]
    fused = numbers.fused(*(numbers.real(each, "bf16") for each in given))
    rounded = numbers.real(numbers.rounded(fused, "bf16"), "bf16")
    assert Fraction(float(rounded[0])) == nearest(exact, 8)


@given(SINGLE)
def test_narrow_floats(value: float) -> None:
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = torch.tensor(value, dtype=torch.float32).to(dtype)
        with np.errstate(over="ignore"):
            found = int(numbers.rounded(np.array([value]), kind)[0])
        assert found == int(expected.view(torch.int16)) % 2**16


def test_a_sum_next_to_a_tie() -> None:
    """What is below it is more than float64 has digits for."""
    a, b, c = 2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23
    assert a * b + c == c + 2.0**-24  # a tie, which would go up
    found = result("fma.rn.f32 %r0, %r1, %r2, %r3", bits_of(a), bits_of(b), bits_of(c))
    assert found == bits_of(c)


def test_copies_arrive_when_they_are_waited_for() -> None:
    copy = """
	shl.b32 %r5, %r21, 4;
	mov.b32 %r6, global_smem;
	add.s32 %r5, %r5, %r6;
	mov.b32 %r7, 16;
	cp.async.cg.shared.global [%r5 + 0], [%rd2 + 0], 0x10, %r7;
	cp.async.commit_group;
	cp.async.commit_group;
	cp.async.wait_group WAITED;
	bar.sync 0;
	ld.shared.b32 %r8, [%r5+4];
	st.global.b32 [%rd2 + 12], {%r8};
"""
    words = torch.arange(THREADS * 4, dtype=torch.int32).reshape(THREADS, 4)
    expected = words[:, 1].clone()
    run(copy.replace("WAITED", "1"), words)
    assert torch.equal(words[:, 3], expected)
    run(copy.replace("WAITED", "2"), words)
    assert (words[:, 3] == words[0, 3]).all()  # what was there before: nothing


def test_what_is_not_copied_is_zero() -> None:
    words = torch.full((THREADS, 4), 9, dtype=torch.int32)
    run(
        "mov.b32 %r5, global_smem; mov.b32 %r7, 0; mov.b64 %rd5, 0;"
        "cp.async.ca.shared.global [%r5 + 0], [%rd5 + 0], 0x4, %r7;"
        "cp.async.commit_group; cp.async.wait_group 0;"
        "ld.shared.b32 %r8, [global_smem]; st.global.b32 [%rd2 + 0], {%r8};",
        words,
    )
    assert not words[:, 0].any()


def test_threads_part_and_meet_again() -> None:
    words = room()
    run(
        "mov.b32 %r1, 1; setp.lt.u32 %p1, %r21, 5; @%p1 bra $L_few;"
        "mov.b32 %r1, 2; setp.eq.b32 %p2, %r21, 7; @%p2 mov.b32 %r1, 3;"
        "$L_few: add.s32 %r1, %r1, 10; st.global.b32 [%rd2 + 0], {%r1};",
        words,
    )
    assert words[:, 0].tolist() == [11] * 5 + [12] * 2 + [13] + [12] * 24


def test_loops_and_blocks() -> None:
    """The last block counts first: its number is what a counter had."""
    words = room()
    run(
        "mov.b32 %r1, 0; $L_again: add.s32 %r1, %r1, 3; setp.lt.s32 %p1, %r1, %r20;"
        "@%p1 bra $L_again; setp.eq.b32 %p2, %r21, 0; mov.b32 %r2, 1;"
        "@%p2 atom.global.gpu.acq_rel.add.u32 %r3, [%rd1 + 4], %r2;"
        "mov.u32 %r4, %ctaid.x; mov.u32 %r5, %nctaid.x;"
        "sub.s32 %r5, %r5, %r4; @%p2 setp.eq.b32 %p3, %r3, 2;"
        "st.global.b32 [%rd2 + 0], {%r1}; @%p2 st.global.b32 [%rd2 + 8], {%r5};",
        words,
        given=7,
        grid=(3, 1, 1),
    )
    assert words[:, 0].tolist() == [9] * THREADS
    assert words[0, 1:3].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 {%r1}, [%rd2 + 16];", "no tensor at"),
        ("ld.global.b32 {%r1}, [%rd2 + 2];", "of 4 bytes|no multiple of 4"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd2 + 4];", "no multiple of 8"),
        ("mov.b32 %r1, 1024; ld.shared.b32 %r2, [%r1];", "no tensor at"),
        ("setp.lt.u32 %p1, %r21, 5; @%p1 bra $L_end; ret; $L_end:", "end before the others"),
        ("setp.lt.u32 %p1, %r21, 5; @%p1 bra $L_end; bar.sync 0; $L_end:", "bar.sync"),
        ("sqrt.rn.f32 %r1, %r2;", "sqrt"),
        (
            "ld.shared.b32 %r1, [global_smem]; mov.b64 %rd5, 0; ld.global.b32 {%r1}, [%rd5];",
            "no te",
        ),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        run(body, room())


EXCHANGE = """
	shl.b32 %r5, %r21, 2;
	xor.b32 %r6, %r5, OTHER;
	st.shared.b32 [%r5], %r21;
	FIRST
	ld.shared.b32 %r7, [%r6];
	SECOND
	st.shared.b32 [%r5], %r7;
	st.global.b32 [%rd2 + 0], {%r7};
"""
"""Threads read what another wrote, OTHER bytes away: with 4 of their warp, with 128 of the next."""


@pytest.mark.parametrize(("first", "second"), [(1, 1), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("other", [4, 128])
def test_warps_wait_for_each_other(other: int, first: int, second: int) -> None:
    words = torch.zeros(64, 4, dtype=torch.int32)
    body = EXCHANGE.replace("OTHER", str(other))
    body = body.replace("FIRST", "bar.sync 0;" * first + "bar.warp.sync -1;")
    body = body.replace("SECOND", "bar.sync 0;" * second)
    if other == 4 or (first and second):
        run(body, words)
        assert words[:, 0].tolist() == [thread ^ other // 4 for thread in range(64)]
    else:
        with pytest.raises(FaultError, match=f"has {'read' if first else 'written'} this, and no"):
            run(body, words)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_who_counts_waits_for_the_others(barrier: str) -> None:
    words = torch.zeros(64, 4, dtype=torch.int32)
    body = f"st.global.b32 [%rd2 + 0], {{%r21}}; {barrier}"
    body += "setp.eq.b32 %p1, %r21, 0; mov.b32 %r2, 1;"
    body += "@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%rd1 + 4], %r2;"
    if barrier:
        run(body, words)
        assert int(words[0, 1]) == 1
    else:
        with pytest.raises(FaultError, match="may not have written yet"):
            run(body, words)


def test_what_is_not_written_is_no_zero() -> None:
    words = room()
    run("ld.shared.b32 %r1, [global_smem]; st.global.v2.b32 [%rd2 + 0], {%r1, %r9};", words)
    assert words[:, :2].all()


def test_lanes() -> None:
    words = room()
    run(
        "shfl.sync.bfly.b32 %r1, %r21, 3, 31, -1; shfl.sync.idx.b32 %r2, %r21, 9, 31, -1;"
        "mov.b32 %r3, -1; redux.sync.add.s32 %r4, %r21, %r3;"
        "st.global.v4.b32 [%rd2 + 0], {%r1, %r2, %r4, %r4};",
        words,
    )
    assert words[:, 0].tolist() == [lane ^ 3 for lane in range(32)]
    assert words[:, 1:3].tolist() == [[9, 31 * 16]] * 32
