"""PTX text as a list of instructions, with labels, kernel parameters and the number of threads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .formats import TYPES

IGNORED = (".loc", ".reg", ".file", ".pragma", ".section", ".target", ".version", ".address_size")


class KernelError(Exception):
    """A kernel did something undefined in hardware or unsupported by the interpreter. Names the instruction."""


class Address(NamedTuple):
    """A memory operand `[base+offset]`: a register, a parameter or a variable, and bytes."""

    base: str
    offset: int


class Block(NamedTuple):
    """A tensor copy's operand `[descriptor, {column, row}]`."""

    base: str
    coordinates: tuple[str, ...]


Operand = str | Address | Block | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard opcode.modifiers operands`."""

    text: str
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None  # "%p1" or "!%p1"

    @property
    def kind(self) -> str:
        """The last modifier: mostly the type."""
        return self.parts[-1]

    def number(self, place: int = 0) -> int:
        """The value of a literal operand."""
        return int(str(self.operands[place]), 0)

    def unknown(self) -> KernelError:
        """The error for an instruction that the interpreter does not support."""
        return KernelError(f"the interpreter does not know {self.opcode}")


class Parameter(NamedTuple):
    """A kernel parameter: its type, and its byte offset among all parameters."""

    kind: str
    place: int


@dataclass
class Program:
    """A compiled kernel."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: dict[str, Parameter]
    threads: int

    @cached_property
    def targets(self) -> frozenset[str]:
        """Registers that some instruction writes, or may: first operands, a vector's members, both of `%r1|%p1`."""
        firsts = (i.operands[0] for i in self.instructions if i.operands)
        names = (name for first in firsts if not isinstance(first, Address | Block) for name in members(first))
        return frozenset(part for name in names for part in name.split("|"))

    def placed(self, values: Iterable[Any]) -> dict[int, Any]:
        """Map the parameters' byte offsets to values, which are given in the parameters' order."""
        pairs = zip(self.parameters.values(), values, strict=True)
        return {one.place: float(value) if one.kind == "f32" else value for one, value in pairs}

    @classmethod
    def parse(cls, ptx: str) -> Program:
        """Parse the only entry of a module."""
        entry = re.search(r"\.visible \.entry (\w+)\s*\((.*?)\)(.*?)\{(.*)", ptx, re.S)
        if entry is None:
            raise KernelError("no kernel entry in this PTX")
        name, signature, attributes, body = entry.groups()
        threads = re.search(r"\.reqntid (\d+)", attributes)
        if threads is None:
            raise KernelError(f"{name} has no .reqntid: the number of its threads is not known")
        return cls(name, *_instructions(body), _parameters(signature), int(threads[1]))


def members(operand: Any) -> tuple[str, ...]:
    """The registers of a vector, or the operand itself as the only one."""
    return operand if isinstance(operand, tuple) else (operand,)


def _parameters(signature: str) -> dict[str, Parameter]:
    """Lay out parameters one after another, aligned naturally or as declared."""
    parameters, end = {}, 0
    pattern = r"\.param (?:\.align (\d+) )?\.(\w+)[^,\n]*?\s(\w+_param_\d+)(?:\[(\d+)\])?"
    for alignment, kind, name, count in re.findall(pattern, signature):
        one = np.dtype(TYPES[kind]).itemsize
        size, aligned = one * int(count or 1), int(alignment or one)
        place = -(-end // aligned) * aligned
        parameters[name] = Parameter(kind, place)
        end = place + size
    return parameters


def _instructions(body: str) -> tuple[list[Instruction], dict[str, int]]:
    lines = (line.split("//")[0].strip() for line in body.split("\n"))
    kept: list[str] = []
    for line in lines:
        if line == "}" and _closed(kept):
            break
        if line and not line.startswith(IGNORED):
            kept.append(line)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for chunk in "\n".join(kept).split(";"):
        text = " ".join(chunk.split()).lstrip("{} ").rstrip("{ ")
        while label := re.match(r"(\$?[\w$]+):\s*", text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :].lstrip("{} ")
        if (branch := re.search(r"\bbra(\.uni)? ([a-z]\w*)$", text)) and branch[2] in labels:
            # inline assembly repeats its labels in every copy: a branch means the last one before it
            place = labels[branch[2]]
            text = f"{text}_{place}"
            labels[f"{branch[2]}_{place}"] = place
        if text and text not in ("{", "}"):
            instructions.append(parse_instruction(text))
    return instructions, labels


def _closed(lines: list[str]) -> bool:
    """True if every scope that was opened inside the body is closed, so that the next brace ends the body."""
    text = "\n".join(lines)
    scopes = re.sub(r"\{[^{}\n]*\}", "", text)  # vectors of operands, on one line
    return scopes.count("{") == scopes.count("}")


def parse_instruction(text: str) -> Instruction:
    """Parse text such as `@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+16]`."""
    guard, rest = None, text
    if match := re.match(r"@(!?%?\w+)\s+", text):
        guard, rest = match[1], text[match.end() :]
    opcode, _, operands = rest.partition(" ")
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,])+", operands)  # at commas outside of brackets
    return Instruction(text, opcode, tuple(opcode.split(".")), tuple(map(_operand, parts)), guard)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(name.strip() for name in text[1:-1].split(","))
    if match := re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]", text):
        return Block(match[1], tuple(name.strip() for name in match[2].split(",")))
    if match := re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text):
        return Address(match[1], int(match[2], 0) if match[2] else 0)
    return text
