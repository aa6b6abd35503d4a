"""Codes of up to four bits looked up in registers, four rows of a column at once.

Codes whose table belongs to a column, or to a whole cell, are packed for the instruction `prmt`,
which takes four bytes by four indices out of eight: a table of eight 16-bit numbers is eight bytes
of their lower halves and eight of their upper ones, and four rows' codes are a half word of
indices.  A warp then must have many rows and few columns, so each has 16 columns of the 64 rows,
twice.  Thread (w, l, c) of 4 x 8 x 4 has rows 32 s + 16 t + 8 u + l and columns 64 g + 16 w + 8 q +
2 c + h, where each other letter is 0 or 1; half h of a word is the column, and nibble 2 t + u of it
the row:

    4 bits  words (s, q), for g = 0 of all threads, then for g = 1
    3 bits  three words for the first three of (s, q), in whose nibbles' fourth bits are the codes
            of the last; two for g = 0 and for g = 1 of all threads, then the third ones
    2 bits  a word for each s, for g = 0 and 1; q = 1 two bits above q = 0
    1 bit   a word for g = 0 and 1; (s, q) one bit above another

The result is the operand [8, 64, 16] of a product in eight slices of the columns, two of a warp.
In Triton's interpreter `prmt` is not there: the same bytes are found one by one.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from bitmosaic.backends._triton.layout import TABLE, Kind

MOST_BITS = 4


def is_picked(kind: Kind) -> bool:
    """Tell whether codes of a kind are packed like this, if those of its weight are."""
    return kind[0] == TABLE and kind[1] <= MOST_BITS


def pack(codes: Int[Tensor, "cells 64 128"], bits: int) -> Int[Tensor, "cells halves"]:
    """Pack the codes of cells, as this module's docstring says."""
    # [cells, s, t, u, l, g, w, q, c, h] to halves [cells, g, w, l, c, s, q, h]
    codes = codes.to(torch.int32).view(-1, 2, 2, 2, 8, 2, 4, 2, 4, 2)
    rows = codes.permute(0, 5, 6, 4, 8, 1, 7, 9, 2, 3).flatten(8)
    words = (rows << 4 * torch.arange(4, device=codes.device)).sum(8, dtype=torch.int32)
    words = words.flatten(5, 6)  # [cells, g, w, l, c, (s, q), h]
    if bits == 4:
        parts = [words]
    elif bits == 3:
        last, tops = words[..., 3, :], 0x1111 * (1 << torch.arange(3, device=codes.device))
        nibbles = (last[..., None, :] & tops[:, None]) << (3 - torch.arange(3))[:, None].to(tops)
        words = words[..., :3, :] | nibbles
        parts = [words[..., :2, :].permute(0, 2, 3, 4, 1, 5, 6), words[..., 2, :]]
        parts[1] = parts[1].permute(0, 2, 3, 4, 1, 5)
    elif bits == 2:
        words = words[..., 0::2, :] | words[..., 1::2, :] << 2
        parts = [words.permute(0, 2, 3, 4, 1, 5, 6)]
    else:
        words = (words << torch.arange(4, device=codes.device)[:, None]).sum(-2, dtype=torch.int32)
        parts = [words.permute(0, 2, 3, 4, 1, 5)]
    return torch.cat([part.flatten(1).to(torch.int16) for part in parts], dim=1)


def tables(
    values: Tensor, start: Int[Tensor, " columns_or_cells"], by: str, parts: int, dtype: torch.dtype
) -> Int[Tensor, " halves"]:
    """Lay tables of a 16-bit type out for registers.

    `values` are those of all tables, `start` is where that of a column, or of a cell, starts, and
    `parts` counts the eights of entries that are read.
    """
    entry = torch.arange(8 * parts, device=values.device)
    place = (start.long()[:, None] + entry).clamp(max=values.numel() - 1)
    bits = values[place].to(dtype).view(torch.int16).to(torch.int32)
    both = torch.stack([bits & 255, bits >> 8 & 255], dim=1)  # [.., s, (part, u, h, byte)]
    both = both.unflatten(2, (parts, 2, 2, 2))
    halves = (both[..., 0] | both[..., 1] << 8).to(torch.int16)  # [.., s, part, u, h]
    if by == "cell":
        return halves.transpose(1, 2).flatten()
    halves = halves.unflatten(0, (-1, 2, 4, 2))  # block and half of it .., q, c, t
    return halves.permute(0, 2, 5, 4, 3, 1, 6, 7).flatten()


def _register(first: int, s: int, t: int, q: int, u: int) -> str:
    return f"${first + 8 * s + 4 * t + 2 * q + u}"


def _words(bits: int, first: int) -> tuple[list[str], list[str]]:
    """Return the code that makes words of nibbles (s, q), and their names."""
    if bits == 4:
        return [], [_register(first, s, 0, q, 0) for s in (0, 1) for q in (0, 1)]
    names = ["n0", "n1", "n2", "n3"]
    low, high = _register(first, 0, 0, 0, 0), _register(first, 1, 0, 0, 0)
    if bits == 3:
        third = _register(first + 16, 0, 0, 0, 0)
        code = [f"and.b32 n{n}, {word}, 0x77777777;" for n, word in enumerate((low, high, third))]
        code += [f"shr.b32 n3, {low}, 3;", "and.b32 n3, n3, 0x11111111;"]
        for by, word in ((2, high), (1, third)):
            code += [
                f"shr.b32 x, {word}, {by};",
                f"lop3.b32 n3, x, 0x{0x11111111 << 3 - by:x}, n3, 0xea;",
            ]
    elif bits == 2:
        code = []
        for n, word in ((0, low), (2, high)):
            code += [f"and.b32 n{n}, {word}, 0x33333333;", f"shr.b32 x, {word}, 2;"]
            code += [f"and.b32 n{n + 1}, x, 0x33333333;"]
    else:
        code = [f"and.b32 n0, {low}, 0x11111111;"]
        for n in (1, 2, 3):
            code += [f"shr.b32 x, {low}, {n};", f"and.b32 n{n}, x, 0x11111111;"]
    return code, names


def assembly(bits: int) -> tuple[str, str]:
    """Write the code that makes numbers of a thread's codes and tables, and its constraints.

    It takes 32 numbers of 16 bits at once: registers (s, t, q, u) of pairs h.  Operands are what it
    returns, then the tables' eights, whose register (s, t, q, u) is the column h = t and of it the
    lower (s = 0) or upper bytes of four entries, then the codes.
    """
    parts = 2 if bits == 4 else 1
    code, words = _words(bits, 16 + 16 * parts)
    for s in (0, 1):
        for q in (0, 1):
            word = words[2 * s + q]
            if bits == 4:  # the lower eight entries, the upper eight, and which of them
                code += [f"and.b32 x, {word}, 0x77777777;", f"shr.b32 y, {word}, 1;"]
                code += ["lop3.b32 y, y, 0x44444444, 0x32103210, 0xea;"]
                word = "x"
            for h in (0, 1):
                which, upper = (word, "y") if h == 0 else ("z", "v")
                if h:
                    code += [f"shr.b32 z, {word}, 16;"]
                    code += ["shr.b32 v, y, 16;"] if bits == 4 else []
                for half in (0, 1):
                    found = f"f{half}"
                    eights = [
                        ", ".join(_register(16 + 16 * p, half, h, q, u) for u in (0, 1))
                        for p in range(parts)
                    ]
                    code += [f"prmt.b32 {found}, {eights[0]}, {which};"]
                    if bits == 4:
                        code += [f"prmt.b32 a{h}, {eights[1]}, {which};"]
                        code += [f"prmt.b32 {found}, {found}, a{h}, {upper};"]
                code += [f"prmt.b32 a{h}, f0, f1, 0x5140;", f"prmt.b32 b{h}, f0, f1, 0x7362;"]
            for t, pair in ((0, "a"), (1, "b")):
                for u, order in ((0, "0x5410"), (1, "0x7632")):
                    code += [f"prmt.b32 {_register(0, s, t, q, u)}, {pair}0, {pair}1, {order};"]
    declared = ".reg .b32 n0, n1, n2, n3, x, y, z, v, f0, f1, a0, a1, b0, b1;"
    operands = parts + 1 + (bits == 3)
    constraints = ",".join(["=&r"] * 16 + ["r"] * 16 * operands)
    return "\n".join(["{", declared, *code, "}"]), constraints
