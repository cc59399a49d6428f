"""From sums to layers: checked, added up over processes, factored by one owner each, written, kept in a cache."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...distributed.process_group import Processes
from ...layers.linear import LoRASBLinear
from ..gradients.accumulator import GradientSums, LayerSum
from ..gradients.block_stack import NotAStackError, find_stack
from ..gradients.task import Layers
from ..linalg.svd import full_precision
from ..report.layer_report import LayerReport
from .factorize import Gradient, Recipe, count_triplets, factor
from .measurements import Measurements
from .methods import Factors, subspace_of_weight
from .sign_cache import Cache, CachedGradient, cached
from .transaction import Staging


@dataclass
class Filling:
    """Layers on their way from gradients to factors.

    Attributes:
        reports: of the layers that are through.
        called: layers that ran in a forward.
    """

    layers: Layers
    recipe: Recipe
    processes: Processes
    staging: Staging
    halves: bool = False
    cache: Cache | None = None
    reports: dict[str, LayerReport] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def take(self, found: GradientSums) -> list[str]:
        """Use up the sums of a block or a pass; returns the names of its layers that are through."""
        names = list(found.layers)
        reached = self.processes.all_reduce_sum(
            torch.tensor([[n in found.sums, n in found.called] for n in names]).int()
        )
        self.called |= {name for name, (_, ran) in zip(names, reached.tolist(), strict=True) if ran}
        through = [name for name, (some, _) in zip(names, reached.tolist(), strict=True) if some]
        gradients: dict[str, Gradient] = {name: self._whole(name, found.sums.pop(name, None)) for name in through}
        self._fill(gradients)
        return through

    def take_cached(self, gradients: dict[str, CachedGradient]) -> None:
        """Factor from signs that a cache kept."""
        for name, gradient in gradients.items():
            self._fill({name: gradient})

    def take_finished(self) -> None:
        """Factor the blocks that an interrupted run had finished."""
        found = self.cache.layers if self.cache is not None else {}
        self.take_cached({name: layer for name, layer in found.items() if name not in self.reports})

    def _whole(self, name: str, found: LayerSum | None) -> LayerSum:
        """The sum over all processes, checked.

        Raises:
            ValueError: NaN, Inf or nothing but zeros.
        """
        layer, mine = self.layers[name], found or LayerSum(self.halves)
        if self.processes.is_distributed:
            nothing = _nothing(layer)
            total, half = found.value() if found is not None else nothing, mine.half
            mine.merge(self.processes.all_reduce_sum(total))
            if self.halves:
                mine.half = self.processes.all_reduce_sum(half if half is not None else nothing)
        if not mine.finite:
            raise ValueError(
                f"the gradient of layer {name!r} has NaN or Inf entries: check the data, or load the model in fp32 or "
                "bf16. Nothing was changed"
            )
        if mine.zeros == layer.in_features * layer.out_features:
            raise ValueError(
                f"the gradient of layer {name!r} is zero: the loss does not depend on it. Nothing was changed"
            )
        return mine

    def _fill(self, gradients: dict[str, Gradient]) -> None:
        """Factor, each layer by its owner, and write everywhere."""
        own: dict[str, tuple[Factors, Measurements]] = {}
        error: Exception | None = None
        owners = {name: i % self.processes.world_size for i, name in enumerate(gradients)}
        try:
            for name, owner in owners.items():
                if owner == self.processes.rank:
                    own[name] = factor(name, gradients[name], self.layers[name], self.recipe)
                elif self.cache is None or self.processes.rank != 0:
                    gradients[name] = LayerSum()  # somebody else's: let go of it
        except Exception as caught:
            error = caught
        self.processes.raise_on_every_rank(error)
        for name, owner in owners.items():
            factors, measured = self._from_owner(name, own.get(name), owner)
            self.staging.write(self.layers[name], factors)
            if self.cache is not None and self.processes.rank == 0 and not isinstance(gradients[name], CachedGradient):
                self.cache.add(name, cached(gradients[name], measured.of_gradient))
            self.reports[name] = measured.report(name, self.layers[name], self.recipe.adapter)
            del gradients[name]

    def _from_owner(
        self, name: str, own: tuple[Factors, Measurements] | None, owner: int
    ) -> tuple[Factors, Measurements]:
        """A layer's factors and measurements on every process."""
        if own is not None and not self.processes.is_distributed:
            return own
        layer = self.layers[name]
        r, q = layer.r[self.recipe.adapter], count_triplets(layer, self.recipe.adapter)
        device = next(layer.lorasb_R.parameters()).device
        if own is not None:
            factors, packed = own[0], own[1].to_tensor()
        else:  # places for what the owner sends
            m, n = layer.out_features, layer.in_features
            factors = Factors(*(torch.empty(shape, device=device) for shape in ((m, r), (r, r), (r, n), (r,))))
            packed = torch.empty(Measurements.size(q), dtype=torch.float64)
        factors = Factors(*(self.processes.broadcast(part.float(), owner) for part in factors))
        return factors, Measurements.from_tensor(self.processes.broadcast(packed, owner))

    def stand_in(self, model: nn.Module, names: list[str]) -> None:
        """Layers that no sample reached: the leading subspace of their weight and R = 0, as their first step is zero.

        Only where the samples took another way inside the same block (experts that were not routed to).

        Raises:
            ValueError: the loss does not depend on a layer, or its whole block was passed by.
        """
        for name in names:
            if name in self.called:
                raise ValueError(
                    f"layer {name!r} ran, but the loss does not depend on it: leave it out with exclude_modules"
                )
            if not self._block_ran(model, name):
                raise ValueError(
                    f"layer {name!r} was never reached by the loss of these batches: leave it out with "
                    "exclude_modules, or pass batches that use it"
                )
        if names:
            warnings.warn(
                f"{len(names)} layers were not reached by these samples and start from their weight's subspace with "
                f"R = 0: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. More samples may reach them",
                UserWarning,
                stacklevel=4,
            )
        for name in names:
            layer = self.layers[name]
            weight, r = layer.dense_weight().detach().float(), layer.r[self.recipe.adapter]
            with full_precision():
                factors = subspace_of_weight(weight, r, self.recipe.seed_of(name))
            self.staging.write(layer, factors)
            shape = (layer.out_features, layer.in_features)
            sigma = tuple(float(value) for value in factors.sigma)
            self.reports[name] = LayerReport(name, shape, r, None, None, sigma, 0, 0.0, fallback="weight")

    def _block_ran(self, model: nn.Module, name: str) -> bool:
        try:
            stack = find_stack(model, self.layers)
        except NotAStackError:
            return False
        block = next((targets for targets in stack.targets if name in targets), {})
        return any(other in self.reports for other in block)


def _nothing(layer: LoRASBLinear) -> Tensor:
    """The sum of a process that had no sample for a layer."""
    dtype = torch.float64 if layer.base_dtype == torch.float64 else torch.float32
    device = next(layer.lorasb_R.parameters()).device
    return torch.zeros(layer.out_features, layer.in_features, device=device, dtype=dtype)
