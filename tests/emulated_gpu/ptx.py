"""PTX as Triton writes it, read into instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NOT_CODE = re.compile(r"^\s*\.(loc|file|pragma)\b.*$|//.*$", re.MULTILINE)
_LABEL = re.compile(r"\s*(\$[\w$]+|\w+):(?!:)")
_SCOPE = re.compile(r"\s*[{}]")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: the predicate under which it is done, if any; `negated` if where that is false.
        opcode: the name's parts, which stand between points.
        operands: a name, a number, or several of them: in braces, or in brackets (an address).
        text: as it was written, for messages.
    """

    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        target: the architecture that it is for: "sm_80".
        parameters: names, and the types of what is given.
        threads: threads of a block.
        widths: bits of the registers whose names begin so; predicates have one.
        instructions: in their order.
        labels: numbers of instructions to go on with.
    """

    target: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    widths: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def width(self, register: str) -> int:
        """Return a register's bits."""
        return self.widths[register] if register in self.widths else self.widths[_family(register)]


def parse(text: str) -> Program:
    """Read a module of one kernel."""
    code = _NOT_CODE.sub("", text.split("\n\t.section")[0])  # sections are a debugger's
    head, body = re.split(r"\n\{", code, maxsplit=1)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    for statement in body.rsplit("}", 1)[0].split(";"):
        rest = statement
        while found := _LABEL.match(rest) or _SCOPE.match(rest):
            if found.lastindex:
                labels[found[1]] = len(instructions)
            rest = rest[found.end() :]
        rest = " ".join(rest.split())
        if rest.startswith(".reg"):
            _, kind, names = rest.split(" ", 2)
            for name in names.split(","):
                widths[_family(name.split("<")[0].strip())] = _WIDTHS[kind.removeprefix(".")]
        elif rest:
            instructions.append(_instruction(rest))
    return Program(
        re.findall(r"^\.target (\w+)", head, re.MULTILINE)[0],
        tuple(
            (name, kind) for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+)[,\n)]", head)
        ),
        int(re.findall(r"\.reqntid (\d+)", head)[0]),
        widths,
        tuple(instructions),
        labels,
    )


def split(operands: str) -> tuple[str, ...]:
    """Take operands apart at commas, but those within braces and brackets."""
    return tuple(each.strip() for each in re.split(r",(?![^{\[]*[}\]])", operands) if each.strip())


def members(operand: str) -> tuple[str, ...]:
    """Return the names in braces, or the one name."""
    return split(operand.strip("{} ")) if operand.startswith("{") else (operand,)


def _instruction(text: str) -> Instruction:
    found = _INSTRUCTION.match(text)
    if found is None:
        raise ValueError(f"Not an instruction: {text}")
    negated, guard, name, operands = found.groups()
    return Instruction(guard, negated == "!", tuple(name.split(".")), split(operands), text)


def _family(register: str) -> str:
    """Return what registers of one type begin with: `%rs` of `%rs12`, else the name."""
    return re.sub(r"\d+$", "", register) if register.startswith("%") else register
