"""Starts that read the gradients themselves: weighed by spread, whitened, or taken later in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lorasb
from benchmarks.research.methods import starts
from benchmarks.research.methods.problems import Batch
from lorasb.init.accumulator import GradientSums
from lorasb.init.factorize import first_step, start_share
from lorasb.init.initialization import LONGEST_START
from lorasb.init.loss import backward_over_samples
from lorasb.init.svd import leading_triplets

LATER = "later"  # the second adapter; the first one's R is then frozen


def summed(model: Any, layers: Mapping[str, nn.Module], samples: Sequence[Batch], sketches: Any = None) -> GradientSums:
    """Sum G of every layer at the model's weights, adapters included; no `.grad` is touched.

    Runs in evaluation mode, like an initialization. Afterwards the model is in training mode, with its previous
    `requires_grad` flags.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    with GradientSums(layers, sketch=sketches or (lambda name: None)) as sums:
        for batch in samples:
            backward_over_samples(model, batch, None)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train()
    return sums


def weigh_by_spread(model: Any, samples: Sequence[Batch], eta: float) -> None:
    """Set factors from ΣG/√ΣG² over samples instead of sign(ΣG): entries that samples disagree on count less.

    R starts as it does with the sign, at most `LONGEST_START` steps long.
    """
    layers = starts.layers(model)
    totals: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for one in (row for batch in samples for row in rows(batch)):
        for name, layer_sum in summed(model, layers, [one]).sums.items():
            gradient = layer_sum.value()
            totals[name] = totals[name].add_(gradient) if name in totals else gradient.clone()
            squares[name] = squares[name].addcmul_(gradient, gradient) if name in squares else gradient.square()
    for name, layer in layers.items():
        weighed = torch.where(squares[name] > 0, totals[name] * squares[name].rsqrt(), 0.0)
        r = layer.r[starts.ADAPTER]
        triplets = leading_triplets(weighed, r, 0)
        share = start_share(float(triplets.s[:r].norm()), r, LONGEST_START)
        found = first_step(triplets, r, share * eta, layer.scaling[starts.ADAPTER])
        layer.set_factors(starts.ADAPTER, found.b, found.core, found.a)


DAMPING = 0.1  # of the mean eigenvalue, added to both Kronecker factors


@torch.no_grad()
def whiten(model: Any, samples: Sequence[Batch]) -> None:
    """Set factors from the gradient whitened by both Kronecker factors (K-FAC), with R = 0.

    With L = Σδδᵀ and C = Σxxᵀ over tokens with a gradient: the leading triplets U, V of L^(-1/2) ΣG C^(-1/2),
    mapped back and orthonormalized: B = orth(L^(-1/2) U), A = orth(C^(-1/2) V)ᵀ (CG-LoRA, arXiv 2603.29824).
    """
    layers = starts.layers(model)
    for name, (gradient, left, right) in _kronecker(model, samples).items():
        layer = layers[name]
        r = layer.r[starts.ADAPTER]
        back, forth = _inverse_root(left), _inverse_root(right)
        u, _, vt = leading_triplets(back @ gradient @ forth, r, 0).first(r)
        b, a = torch.linalg.qr(back @ u).Q, torch.linalg.qr(forth @ vt.t()).Q.t()
        layer.set_factors(starts.ADAPTER, b, torch.zeros(r, r), a.contiguous())


def _kronecker(model: Any, samples: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """ΣG, Σδδᵀ and Σxxᵀ of every layer, in fp32, at a start with R = 0."""
    found: dict[str, list[Tensor]] = {}

    def add(name: str, x: Tensor, dy: Tensor) -> None:
        x, dy = x.flatten(0, -2).float(), dy.flatten(0, -2).float()
        x = x * dy.any(1, keepdim=True)
        sums = [dy.t() @ x, dy.t() @ dy, x.t() @ x]
        found[name] = [a + b for a, b in zip(found[name], sums, strict=True)] if name in found else sums

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda dy: add(name, inputs[0].detach(), dy))

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in starts.layers(model).items()]
    model.eval()
    try:
        with torch.enable_grad():
            for batch in samples:
                backward_over_samples(model, batch, None)
    finally:
        for handle in handles:
            handle.remove()
    model.zero_grad()
    model.train()
    return found


def _inverse_root(matrix: Tensor) -> Tensor:
    """(M + damping)^(-1/2) of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.clamp(min=0) + DAMPING * values.mean()).rsqrt()) @ vectors.t()


def rows(batch: Batch) -> list[Batch]:
    """Batches of one sample each."""
    count = len(next(iter(batch.values())))

    def row(value: Any, i: int) -> Any:
        """Slice a tensor; return numbers, such as how many logits are needed, unchanged."""
        return value[i : i + 1] if isinstance(value, Tensor) else value

    return [{name: row(value, i) for name, value in batch.items()} for i in range(count)]


def take_again(model: Any, r: int, seed: int, samples: Sequence[Batch]) -> list[nn.Parameter]:
    """Continue in the subspaces of sign(G) at the current weights; what was learned stays in effect.

    The first adapter's R is frozen, and a second adapter with R = 0 has the new subspaces: no weight is rounded.

    Returns:
        The R's that train from here on.
    """
    layers = starts.layers(model)
    found = {name: one.signs().bits for name, one in summed(model, layers, samples).sums.items()}
    config = model.peft_config[starts.ADAPTER]
    model.add_adapter(LATER, lorasb.LoRASBConfig(r=r, target_modules=config.target_modules, init="random"))
    for name, layer in layers.items():
        u, _, vt = leading_triplets(found[name], r, seed).first(r)
        layer.set_factors(LATER, u, torch.zeros(r, r), vt)
    model.base_model.set_adapter([starts.ADAPTER, LATER])
    for layer in layers.values():
        layer.lorasb_R[starts.ADAPTER].requires_grad_(False)
    return [layer.lorasb_R[LATER] for layer in layers.values()]
