"""Finding the stack of blocks in a model: the ModuleList with most of the targets, and the targets of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...constants import PEFT_PREFIX


class NotAStackError(ValueError):
    """The model is no plain stack: blocks do not pass on a single tensor, or share other state."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks that are computed one at a time.

    Attributes:
        name: name of the list in the base model.
        blocks: the blocks, from the first to the last.
        targets: targets of each block, by name.
        uncut: number of blocks that were removed from the top, to be differentiated together with the head.
    """

    name: str
    blocks: list[nn.Module]
    targets: list[dict[str, nn.Module]]
    uncut: int = 0

    @property
    def names(self) -> set[str]:
        """Names of all targets inside the blocks."""
        return {name for block in self.targets for name in block}

    def without_top(self, count: int) -> Stack:
        """The stack without its last `count` blocks, which are then differentiated together with the head."""
        end = len(self.blocks) - count
        return Stack(self.name, self.blocks[:end], self.targets[:end], self.uncut + count)

    @property
    def course(self) -> str:
        """Identifies the order of computation in a cache: a resumed run has to use the same."""
        return f"{self.name}, last {self.uncut} together" if self.uncut else self.name

    @property
    def lowest(self) -> int:
        """Index of the first block that has a target: blocks below it need no gradient."""
        return next(i for i, block in enumerate(self.targets) if block)


def find_stack(model: nn.Module, layers: Mapping[str, nn.Module], name: str | None = None) -> Stack:
    """The ModuleList that holds most weights of the targets, or the one called `name`.

    Raises:
        NotAStackError: no such list, or one without a target.
    """
    # Blocks may contain lists of their own (experts), which hold fewer weights than the list of blocks.
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        lists = {n: m for n, m in lists.items() if n == name or n.endswith("." + name)}
        if not lists:
            raise NotAStackError(f"the model has no list of modules {name!r}")
    stacks = [_stack(n, blocks, layers) for n, blocks in lists.items()]
    best = max(stacks, key=_count_weights, default=None)
    if best is None or not best.names:
        raise NotAStackError("no list of modules holds a target layer")
    return best


def _stack(name: str, blocks: nn.ModuleList, layers: Mapping[str, nn.Module]) -> Stack:
    """The stack of a list of blocks, with the targets assigned to the blocks that contain them."""
    block_indices: dict[int, set[int]] = {}  # by id of a module: one that several blocks share has several
    for i, block in enumerate(blocks):
        for module in block.modules():
            block_indices.setdefault(id(module), set()).add(i)
    targets: list[dict[str, nn.Module]] = [{} for _ in blocks]
    for layer, module in layers.items():
        indices = block_indices.get(id(module), set())
        # A shared layer's sum is complete only after all of its blocks.
        if len(indices) > 1:
            raise NotAStackError(f"layer {layer!r} belongs to several blocks")
        for i in indices:
            targets[i][layer] = module
    return Stack(name.removeprefix(PEFT_PREFIX), list(blocks), targets)


def _count_weights(stack: Stack) -> int:
    return sum(m.in_features * m.out_features for block in stack.targets for m in block.values())  # type: ignore[operator, misc]
