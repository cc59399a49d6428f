"""Write layers from ΣG: reduce and check the sums, factor each layer on one rank, broadcast, write and cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from ..constants import FACTORS
from ..distributed.process_group import Processes
from ..layers import unfused_experts
from ..layers.adapted_layer import AdaptedLayer
from ..utils.reading import Json
from .accumulator import GradientSums, LayerSum
from .block_recorder import NotAStackError, find_stack
from .cache import Cache, CachedGradient
from .factorize import Factors, Gradient, factor, factor_weight
from .init_report import LayerReport
from .task import InitOptions, Layers

Write = Callable[[AdaptedLayer, Factors], None]


@contextmanager
def staging(adapter: str) -> Iterator[Write]:
    """Yield a function that writes factors into a layer; everything it wrote is rolled back if the block raises."""
    with ExitStack() as rollback:  # runs in reverse, so a layer that was written twice gets its original values back

        def write(layer: AdaptedLayer, factors: Factors) -> None:
            """Write B, R and A into a layer, and register how to restore the previous ones."""
            state = layer.adapters[adapter]
            rollback.callback(setattr, state, "initialized", state.initialized)
            for name in FACTORS:
                # In place: an existing optimizer holds these parameters. Zeros, as in uninitialized layers, are not
                # copied: on the first initialization, rollback takes no memory.
                parameter = getattr(layer, name)[adapter].detach()
                if parameter.any():  # `copy=True`: on a CPU layer `to` would return the parameter itself
                    rollback.callback(parameter.copy_, parameter.to("cpu", copy=True))
                else:
                    rollback.callback(parameter.zero_)
            layer.set_factors(adapter, factors.b, factors.core, factors.a)

        yield write
        rollback.pop_all()


@dataclass
class LayerWriter:
    """Factors gradients and writes A, R and B into the layers, bit-identical on every rank."""

    layers: Layers  # all targets, by name
    options: InitOptions
    processes: Processes  # the process group
    write: Write  # from `staging`
    cache: Cache | None = None  # receives the signs of every layer on rank 0, if set
    reports: dict[str, LayerReport] = field(default_factory=dict)  # by name, for layers already written
    called: set[str] = field(default_factory=set)  # names of layers that ran in a forward, on any rank

    def reached(self, sums: GradientSums) -> list[str]:
        """Return the layers that backward reached on any rank: experts may run on one rank only."""
        reached: set[str] = set()
        for summed, called in self.processes.gather_json([list(sums.sums), list(sums.called)]):
            reached.update(summed)
            self.called.update(called)
        return [name for name in sums.layers if name in reached]

    def write_sums(self, sums: GradientSums) -> list[str]:
        """Write the layers of a block or a pass, and free their sums; returns the names of those reached."""
        # `reduced` takes the references, so that a sum is freed when `_factor_and_write` deletes it.
        totals: dict[str, Gradient] = {name: self.reduced(name, sums) for name in self.reached(sums)}
        zero = []
        for name, total in totals.items():
            if not total.signs().finite:
                raise ValueError(
                    f"the gradient of layer {name!r} has NaN or Inf entries: check the data, or load the model in fp32 "
                    "or bf16. Nothing was changed"
                )
            if total.signs().zeros == self.layers[name].in_features * self.layers[name].out_features:
                zero.append(name)
        for name in filter(unfused_experts.parameter_of, zero):  # no loss at their tokens: treat as not routed
            del totals[name]
            self.called.discard(name)
        if zero := [name for name in zero if name in totals]:
            more = f" (and of {', '.join(zero[1:])})" if zero[1:] else ""
            raise ValueError(
                f"the gradient of layer {zero[0]!r}{more} is zero: the loss does not depend on it, or "
                "compares the rows of a batch, which needs loss_fn. Nothing was changed"
            )
        reached = list(totals)
        self._factor_and_write(totals)
        return reached

    def write_cached(self, gradients: dict[str, CachedGradient]) -> None:
        """Write layers from the signs of a cache, one at a time: unpacked signs take 32 times the memory."""
        for name, gradient in gradients.items():
            self._factor_and_write({name: gradient})

    def reduced(self, name: str, sums: GradientSums) -> LayerSum:
        """Return a layer's ΣG over all ranks; removes this rank's own from `sums`, if its samples reached the layer."""
        local = sums.sums.pop(name, None)
        if local is not None and not self.processes.is_distributed:
            return local
        if local is None:  # zeros, in the dtype of the other ranks' sums
            layer, local = self.layers[name], LayerSum(sums.sketch(name))
            dtype = torch.float64 if layer.base.dtype == torch.float64 else torch.float32
            device = layer.lorasb_R[self.options.adapter].device
            local.total = torch.zeros(layer.out_features, layer.in_features, device=device, dtype=dtype)
        # Reduced in fp32 before the sign is taken: sign(ΣG) is not the sum of the ranks' signs.
        reduced, total = LayerSum(local.sketch), local.value()
        reduced.total = self.processes.all_reduce_sum(total)
        if reduced.sketch is not None:
            reduced.sketch.to(total.device)
            reduced.sketch.sums = [self.processes.all_reduce_sum(part) for part in reduced.sketch.sums]
        return reduced

    def _factor_and_write(self, gradients: dict[str, Gradient]) -> None:
        """Factor each layer on its owner rank, and write it on every rank, emptying `gradients` along the way."""
        # One rank computes and broadcasts because the last bits of the SVD's QR depend on the number of threads, and
        # because ranks then share the work.
        # Round-robin over the layers of one block or pass: the same assignment on every rank, without communication.
        owners = {name: i % self.processes.world_size for i, name in enumerate(gradients)}
        factors: dict[str, Factors] = {}
        measured: dict[str, tuple[Json, list[float]]] = {}  # the report, and the energies for the cache
        with self.processes.together():  # before the broadcasts, which a failed rank would not join
            for name, owner in owners.items():
                if owner == self.processes.rank:
                    factors[name], report, energies = factor(name, gradients[name], self.layers[name], self.options)
                    measured[name] = asdict(report), energies
                elif self.cache is None or self.processes.rank != 0:  # rank 0 needs all sums for the cache
                    gradients[name] = LayerSum()  # frees the sum of a layer that another rank owns
        for found in self.processes.gather_json(measured):
            measured |= found
        for name, owner in owners.items():
            layer, gradient, (values, energies) = self.layers[name], gradients[name], measured[name]
            self.write(layer, self._broadcast(owner, layer, factors.get(name)))
            if self.cache is not None and self.processes.rank == 0 and isinstance(gradient, LayerSum):
                self.cache.add(name, gradient.signs(), energies)
            self.reports[name] = LayerReport.of(values)
            del gradients[name], gradient  # the sum is freed before the next layer's factors arrive

    def _broadcast(self, owner: int, layer: AdaptedLayer, factors: Factors | None) -> Factors:
        """Return the owner's factors on every rank; `factors` is None on the others."""
        if factors is not None and not self.processes.is_distributed:
            return factors
        if factors is None:  # buffers: the layer determines all shapes
            m, n, r = layer.out_features, layer.in_features, layer.adapters[self.options.adapter].r
            device = layer.lorasb_R[self.options.adapter].device
            factors = Factors(*(torch.empty(shape, device=device) for shape in ((m, r), (r, r), (r, n), (r,))))
        # `float`: the factors of an fp64 model are fp64, and the buffers are fp32
        return Factors(*(self.processes.broadcast(tensor.float(), owner) for tensor in factors))

    def write_fallbacks(self, model: nn.Module) -> None:
        """Initialize layers that no sample reached with the leading subspace of their weight and R = 0."""
        names = [name for name in self.layers if name not in self.reports]
        if not names:
            return
        if not self.reports:
            raise ValueError("the loss does not depend on any adapted layer: nothing to initialize from")
        try:
            blocks = find_stack(model, self.layers).targets
        except NotAStackError:
            blocks = []
        for name in names:
            if name in self.called:
                raise ValueError(f"layer {name!r} ran, but the loss does not depend on it: name it in exclude_modules")
            # Accepted only if other layers of the same block were reached (experts that no token was routed to).
            block = next((targets for targets in blocks if name in targets), {})
            if not any(target in self.reports for target in block):
                raise ValueError(
                    f"layer {name!r} was never reached by these batches: name it in exclude_modules, or pass others"
                )
        # After all checks, so that an initialization that fails does not warn.
        warnings.warn(
            f"{len(names)} layers were not reached by these samples and start from their weight's subspace with R = 0: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. More samples may reach them, "
            "unless the model reads their weight without calling them: then name them in exclude_modules",
            UserWarning,
            stacklevel=4,
        )
        for name in names:
            layer = self.layers[name]
            factors, report = factor_weight(name, layer, "weight", self.options)
            # from one rank, as the last bits depend on the number of threads
            factors = self._broadcast(0, layer, factors)
            self.write(layer, factors)
            sigma = tuple(map(float, factors.sigma))
            self.reports[name] = replace(report, singular_values=sigma, fallback="weight")
