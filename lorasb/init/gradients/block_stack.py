"""A model as a stack of blocks: which list of modules it is, and the targets of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...constants import PEFT_PREFIX


class NotAStackError(ValueError):
    """The model does not pass one tensor from block to block, or something else passes between them."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks, its name in the model, the targets of each block by name, and how many blocks were left off."""

    name: str
    blocks: list[nn.Module]
    targets: list[dict[str, nn.Module]]
    uncut: int = 0

    @property
    def names(self) -> set[str]:
        """All targets inside."""
        return {name for block in self.targets for name in block}

    def without_top(self, count: int) -> Stack:
        """The same stack less its last blocks, which then belong to what lies above it."""
        end = len(self.blocks) - count
        return Stack(self.name, self.blocks[:end], self.targets[:end], self.uncut + count)

    @property
    def course(self) -> str:
        """How the blocks are gone through: a run that goes on has to go the same way."""
        return f"{self.name}, last {self.uncut} together" if self.uncut else self.name

    @property
    def lowest(self) -> int:
        """The first block that has a target: what lies below needs no gradient."""
        return next(i for i, block in enumerate(self.targets) if block)


def find_stack(model: nn.Module, layers: Mapping[str, nn.Module], name: str | None = None) -> Stack:
    """The list of modules that holds most of the targets' weights, or the one of that name.

    Raises:
        NotAStackError: none, none of that name, or one without a target.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        lists = {n: m for n, m in lists.items() if n == name or n.endswith("." + name)}
        if not lists:
            raise NotAStackError(f"the model has no list of modules {name!r}")
    found = [_stack(n, blocks, layers) for n, blocks in lists.items()]
    best = max(found, key=_weights, default=None)
    if best is None or not best.names:
        raise NotAStackError("no list of modules holds a target layer")
    return best


def _stack(name: str, blocks: nn.ModuleList, layers: Mapping[str, nn.Module]) -> Stack:
    homes: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for module in block.modules():
            homes.setdefault(id(module), set()).add(i)
    targets: list[dict[str, nn.Module]] = [{} for _ in blocks]
    for layer, module in layers.items():
        where = homes.get(id(module), set())
        if len(where) > 1:
            raise NotAStackError(f"layer {layer!r} belongs to several blocks")
        for i in where:
            targets[i][layer] = module
    return Stack(name.removeprefix(PEFT_PREFIX), list(blocks), targets)


def _weights(stack: Stack) -> int:
    return sum(m.in_features * m.out_features for block in stack.targets for m in block.values())  # type: ignore[operator, misc]
