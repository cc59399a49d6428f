"""One adapted linear, or several that read the same x, in every way that is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import linear

import lorasb
from lorasb.functional import lora_sb_linear, lora_sb_linear_group

PEFT_RANK = 32
INPUTS = 4  # sets of inputs that take turns
Forward = Callable[[Tensor], list[Tensor]]


@dataclass
class Problem:
    """Weights W_i [m_i, n] with A_i, R_i, B_i of rank r, and inputs x [M, n] that take turns."""

    n: int
    ms: tuple[int, ...]
    r: int
    M: int
    dtype: torch.dtype
    device: str
    xs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g)

        def place(tensor: Tensor) -> Tensor:
            return tensor.contiguous().to(self.device, self.dtype)

        self.xs = [place(normal(self.M, self.n)).requires_grad_() for _ in range(INPUTS)]
        self.weights = [place(normal(m, self.n) / self.n**0.5) for m in self.ms]
        self.a = [place(torch.linalg.qr(normal(self.n, self.r)).Q.t()) for _ in self.ms]
        self.b = [place(torch.linalg.qr(normal(m, self.r)).Q) for m in self.ms]
        self.cores = [(normal(self.r, self.r) * 0.05).to(self.device).requires_grad_() for _ in self.ms]
        self.dys = [place(normal(self.M, m)) for m in self.ms]
        self.peft: list[Tensor] = []  # PEFT's own factors, once there are some

    def forget_gradients(self) -> None:
        """Clear the gradients that another call left."""
        for tensor in (*self.xs, *self.cores, *self.peft):
            tensor.grad = None

    def parameters(self) -> set[int]:
        """Data pointers of the tensors that the layers hold anyway."""
        return {t.data_ptr() for t in (*self.weights, *self.a, *self.b, *self.cores, *self.peft)}


def variants(problem: Problem) -> dict[str, Forward]:
    """Every way, the bare linears first. On a CPU ours is the addmm form, so only ours is listed."""
    p = problem
    found: dict[str, Forward] = {
        "bare": lambda x: [linear(x, w) for w in p.weights],
        "chain": lambda x: [_chain(p, i, x) for i in range(len(p.ms))],
        f"PEFT LoRA r={PEFT_RANK}": _peft(p),
        "ours": lambda x: _each(p, x),
    }
    if p.device == "cuda":
        found["addmm"] = lambda x: _eager(p, x)
    if len(p.ms) > 1:
        found["ours, grouped"] = lambda x: lora_sb_linear_group(x, p.weights, p.a, p.cores, p.b)
    return found


def _chain(p: Problem, i: int, x: Tensor) -> Tensor:
    """An adapted linear by plain torch calls."""
    return linear(x, p.weights[i]) + linear(linear(linear(x, p.a[i]), p.cores[i].to(x.dtype)), p.b[i])


def _each(p: Problem, x: Tensor) -> list[Tensor]:
    return [lora_sb_linear(x, *parts) for parts in zip(p.weights, p.a, p.cores, p.b, strict=True)]


def _eager(p: Problem, x: Tensor) -> list[Tensor]:
    with lorasb.backend("eager"):
        return _each(p, x)


def _peft(p: Problem) -> Forward:
    """The installed PEFT's LoRA on the same weights; A and B are trained."""
    layers = nn.ModuleList(nn.Linear(p.n, m, bias=False, device="meta") for m in p.ms)
    for layer, weight in zip(layers, p.weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    rank = min(PEFT_RANK, p.n, *p.ms)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(len(p.ms))])
    adapted = inject_adapter_in_model(config, nn.ModuleDict({"layers": layers})).to(p.device)
    if p.dtype != torch.float32:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(p.dtype)
    p.peft += adapted.parameters()
    members = list(adapted.get_submodule("layers").children())
    return lambda x: [layer(x) for layer in members]


def check(problem: Problem, forwards: dict[str, Forward]) -> None:
    """Refuse to time a wrong result: ours against the chain, y and every gradient.

    Raises:
        RuntimeError: they differ by more than the dtype's rounding explains.
    """
    bound = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}[problem.dtype]
    wanted = _results(problem, forwards["chain"])
    for name, forward in forwards.items():
        if not name.startswith(("ours", "addmm")):
            continue
        for got, want in zip(_results(problem, forward), wanted, strict=True):
            error = float((got.detach().float() - want.detach().float()).norm() / want.detach().float().norm())
            if not error < bound:
                raise RuntimeError(f"{name} differs from the chain by {error:.1e} (bound {bound:.0e}): not timed")


def _results(p: Problem, forward: Forward) -> list[Tensor]:
    x = p.xs[0].detach().requires_grad_()
    p.forget_gradients()
    ys = forward(x)
    torch.autograd.backward(ys, p.dys)
    return [*ys, *(t.grad for t in (x, *p.cores) if t.grad is not None)]


def calls(problem: Problem, forwards: dict[str, Forward], direction: str) -> dict[str, Callable[[int], object]]:
    """Timed calls: a forward without gradients, or a forward and backward, on the i-th input."""
    p = problem

    def make(forward: Forward) -> Callable[[int], object]:
        def run(i: int) -> None:
            with torch.no_grad():
                forward(p.xs[i % INPUTS])

        def train(i: int) -> None:
            p.forget_gradients()
            torch.autograd.backward(forward(p.xs[i % INPUTS]), p.dys)

        return run if direction == "forward" else train

    return {name: make(forward) for name, forward in forwards.items()}
