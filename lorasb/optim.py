"""Optimization of R: `lorasb.optim.Muon(lorasb.parameter_groups(model, lr=2e-2, other_lr=1e-3))`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from .layers.adapted_layer import AdaptedLayer
from .utils.checks import check_lr

MUON, ADAMW = "muon", "adamw"
CORE_GROUP = "lorasb_R"  # the name that `lorasb.parameter_groups` gives to the group of all R
# Newton-Schulz: x ↦ a·x + b·x³ + c·x⁵, which brings singular values from (0, 1] to about [0.7, 1.2] in five steps
# (Jordan et al. 2024, the coefficients of torch.optim.Muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7  # of torch.optim.Muon: a matrix of a smaller norm gives a smaller step, down to none


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): R ← R − lr·U Vᵀ, for the SVD U Σ Vᵀ of R's momentum.

    As A and B are orthonormal, W moves by a matrix whose singular values are all about lr (times s), whatever the rank:
    one rate serves all ranks. Unlike in `torch.optim.Muon`, all R of one size are orthogonalized together, in fp32, and
    other parameters take AdamW's steps: `Trainer(..., optimizers=(lorasb.optim.Muon(groups), None))`.

    Args:
        params: groups of `lorasb.parameter_groups(model, lr=..., other_lr=...)`, or matrices alone. A group named
            "lorasb_R" or without a name takes Muon's steps, others AdamW's, unless its `algorithm` ("muon", "adamw")
            says otherwise.
        lr: of groups that name none: the spectral norm of a step of R.
        momentum: μ of Nesterov's momentum, b ← μ·b + g and g + μ·b.
        weight_decay: of groups that name none, decoupled.

    Raises:
        ValueError: a rate, momentum or decay out of range, an unknown algorithm, or Muon for what is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"expected lr >= 0, got {lr!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {momentum!r}")
        if not weight_decay >= 0:
            raise ValueError(f"expected weight_decay >= 0, got {weight_decay!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a check that its algorithm can take its parameters."""
        group = dict(param_group)
        self._complete(group)
        super().add_param_group(group)
        shapes = [list(parameter.shape) for parameter in self.param_groups[-1]["params"]]
        wrong = next((shape for shape in shapes if len(shape) != 2), None)
        if group["algorithm"] == MUON and wrong is not None:
            self.param_groups.pop()
            raise ValueError(
                f"Muon steps matrices, got a parameter of shape {wrong}: leave it to AdamW, "
                "lorasb.optim.Muon(lorasb.parameter_groups(model, lr=2e-2, other_lr=1e-3))"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete groups of a state that another optimizer saved."""
        super().__setstate__(state)
        for group in self.param_groups:
            self._complete(group)

    def _complete(self, group: dict[str, Any]) -> None:
        algorithm = group.setdefault("algorithm", MUON if group.get("name", CORE_GROUP) == CORE_GROUP else ADAMW)
        if algorithm not in (MUON, ADAMW):
            raise ValueError(f"expected a group's algorithm to be {MUON} or {ADAMW}, got {algorithm!r}")
        for name, value in ((_adamw().defaults if algorithm == ADAMW else {}) | self.defaults).items():
            group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step of every group, and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == MUON:
                self._step_matrices(group)
        others = [group for group in self.param_groups if group["algorithm"] == ADAMW]
        if others:
            _adamw_step(others, self.state)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Step matrices of one size and device together: many small products are slow one at a time."""
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault((parameter.shape, parameter.device, parameter.dtype), []).append(parameter)
        for parameters in alike.values():
            momenta = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
            steps = orthogonalize(torch.stack([_whole(momentum) for momentum in momenta]))
            for parameter, step in zip(parameters, steps.to(parameters[0].dtype), strict=True):
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(_shared_like(step, parameter), alpha=-group["lr"])

    def _momentum(self, parameter: Tensor, mu: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if gradient is None:  # not reached; narrows the type
            raise RuntimeError("no gradient")
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"].mul_(mu).add_(gradient)
        return gradient.add(buffer, alpha=mu)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_like(step: Tensor, parameter: Tensor) -> Tensor:
    """A step that every rank has, sharded as the parameter is; no communication."""
    if not isinstance(parameter, DTensor):
        return step
    mesh = parameter.device_mesh
    same_everywhere = DTensor.from_local(step, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same_everywhere.redistribute(placements=parameter.placements)


def _adamw() -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))])


def _adamw_step(groups: list[dict[str, Any]], state: Any) -> None:
    """Run torch's AdamW on other groups and state. Hooks on all optimizers' steps see this step, too."""
    adamw = _adamw()
    adamw.param_groups, adamw.state = groups, state
    adamw.step()


def orthogonalize(matrices: Tensor) -> Tensor:
    """U S Vᵀ for each U Σ Vᵀ of `matrices` [n, r, r], with S about 1; less where the norm is below 1e-7."""
    a, b, c = COEFFICIENTS
    x = matrices.float()  # R is small, and 16-bit products are slower where a processor has no instructions for them
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=1.0)  # squares of large entries would overflow in the norm
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def parameter_groups(
    model: nn.Module, lr: float, *, other_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, as groups for `torch.optim.AdamW(lorasb.parameter_groups(model, lr=1e-3))`.

    R moves inside a fixed subspace and starts at the first step of full fine-tuning, so its learning rate is larger: 10
    to 40 times that of full fine-tuning in docs/choosing.md; the paper has 1e-4 to 2e-3 (Tables 11 and 12).

    Args:
        model: a patched model.
        lr: learning rate of R.
        other_lr: learning rate of every other parameter that requires a gradient; `lr` by default.
        weight_decay: for parameters other than R of two or more dimensions. Decay of R would pull the update, not a
            weight, towards zero.

    Returns:
        Up to three groups named "lorasb_R", "other" and "other, not decayed", none of them empty.

    Raises:
        ValueError: nothing requires a gradient, or a rate is not in [0, 1e4].
    """
    for rate in (lr, lr if other_lr is None else other_lr):
        check_lr(rate, zero=True)
    # by id: parameters compare elementwise
    core_ids = {
        id(core)
        for module in model.modules()
        if isinstance(module, AdaptedLayer)
        for core in module.lorasb_R.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in core_ids]
    if not trained:
        raise ValueError(
            "no parameter requires a gradient: patch the model (lorasb.patch), or make an adapter active for training "
            "(model.set_adapter(name), PeftModel.from_pretrained(..., is_trainable=True))"
        )
    lr_of_others = lr if other_lr is None else other_lr
    groups = (
        ("lorasb_R", [p for p in trained if id(p) in core_ids], lr, 0.0),
        ("other", [p for p in others if p.dim() >= 2], lr_of_others, weight_decay),
        ("other, not decayed", [p for p in others if p.dim() < 2], lr_of_others, 0.0),
    )
    return [
        {"name": name, "params": params, "lr": rate, "weight_decay": decay}
        for name, params, rate, decay in groups
        if params
    ]
