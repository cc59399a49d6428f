"""`lorasb bench tune`: times kernel paths and block sizes on this GPU, and writes the user's table.

Nothing is timed in a training step: layers look their plan up in the tables (`lorasb.kernels.plan`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..backends.triton import missing
from ..kernels import linear as launch
from ..kernels import plan
from ..kernels.block_sizes import DECODE_ROWS, GemmConfig, PrepConfig
from ..kernels.plan import LaunchPlan, Shape
from ..utils.atomic_files import cache_dir, write_text
from ..utils.precision import native

Timer = Callable[[Callable[[], object]], float]
OPS = ("forward", "backward")
# Candidates in addition to the table's choice. Configs that need more registers or shared memory than this GPU has
# do not compile, and are skipped.
PREPS = (PrepConfig(32, 64, 4, 3), PrepConfig(64, 64, 4, 3), PrepConfig(64, 32, 4, 4), PrepConfig(128, 32, 8, 3))
GEMMS = (
    GemmConfig(128, 128, 32, 8, 8, 4, 128),
    GemmConfig(128, 128, 32, 8, 4, 4),
    GemmConfig(128, 128, 64, 8, 8, 3),
    GemmConfig(128, 64, 64, 8, 4, 3),
    GemmConfig(64, 128, 64, 8, 4, 3),
    GemmConfig(64, 64, 32, 8, 4, 4),
)
# For up to DECODE_ROWS tokens: the smallest block of rows that a tensor-core product has.
DECODE_GEMMS = (GemmConfig(16, 64, 64, 1, 4, 3), GemmConfig(16, 32, 128, 1, 4, 4), GemmConfig(16, 128, 64, 1, 4, 4))


@dataclass(frozen=True)
class TunedShape:
    """The fastest plan of a shape, and the times of the table's former choice and of this plan."""

    shape: Shape
    best: LaunchPlan
    before: float
    after: float


def shapes_of(
    layers: Sequence[tuple[int, tuple[int, ...]]], r: int, tokens: Sequence[int], dtype: str
) -> Iterator[Shape]:
    """One shape per layer or group (in, outs), bucket of tokens, and direction."""
    # dict.fromkeys drops duplicates and keeps the order: a model repeats the same layer in every block
    for n, ms in dict.fromkeys(layers):
        for M in dict.fromkeys(plan.bucket(count) for count in tokens):
            yield from (Shape(op, dtype, M, n, sum(ms), r, len(ms)) for op in OPS)


def layers_of(model: nn.Module) -> list[tuple[int, tuple[int, ...]]]:
    """(in, outs) of every linear, and of every group of linears that reads the same x (q/k/v, gate/up)."""
    from ..layers.linear_group import NAMES

    sizes: dict[tuple[int, tuple[int, ...]], None] = {}
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
        for child in children.values():
            sizes[(child.in_features, (child.out_features,))] = None
        for names in NAMES:
            members = [children[name] for name in names if name in children]
            if len(members) > 1 and len({m.in_features for m in members}) == 1:
                sizes[(members[0].in_features, tuple(m.out_features for m in members))] = None
    return list(sizes)


def candidates(shape: Shape, chosen: LaunchPlan) -> Iterator[LaunchPlan]:
    """The table's current plan, then plans with another path, GEMM blocks or prep blocks."""
    yield chosen
    yield LaunchPlan("addmm" if chosen.path == "fused" else "fused", chosen.prep, chosen.gemm)
    gemms = DECODE_GEMMS if shape.M <= DECODE_ROWS else GEMMS
    yield from (LaunchPlan("fused", chosen.prep, gemm) for gemm in gemms if gemm != chosen.gemm)
    if shape.M > DECODE_ROWS:
        yield from (LaunchPlan(chosen.path, prep, chosen.gemm) for prep in PREPS if prep != chosen.prep)


def tune(shapes: Sequence[Shape], arch: str, sms: int, device: str, timer: Timer) -> list[TunedShape]:
    """Time every candidate of every shape; candidates that do not compile or run are skipped."""
    tuned = []
    for shape in shapes:
        chosen = plan.choose(shape, arch, sms)
        times = _times(shape, chosen, device, timer)
        if times:
            best = min(times, key=times.__getitem__)
            tuned.append(TunedShape(shape, best, times.get(chosen, float("inf")), times[best]))
    return tuned


def _times(shape: Shape, chosen: LaunchPlan, device: str, timer: Timer) -> dict[LaunchPlan, float]:
    """The time of each candidate that compiles and runs."""
    times: dict[LaunchPlan, float] = {}
    for candidate in candidates(shape, chosen):
        try:
            times[candidate] = timer(_call(shape, candidate, device))
        except Exception:  # Triton's OutOfResources, or the shape does not fit into memory
            continue
    return times


def _call(shape: Shape, chosen: LaunchPlan, device: str) -> Callable[[], object]:
    """A function that runs one forward or backward of this shape with this plan, on random tensors made here, once."""
    dtype = next(kind for kind, name in plan.DTYPES.items() if name == shape.dtype)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device).to(kind)

    ms = [shape.m // shape.members] * shape.members
    members = launch.Members(
        [normal(m, shape.n) for m in ms],
        [normal(shape.r, shape.n) for _ in ms],
        [normal(shape.r, shape.r, kind=torch.float32) for _ in ms],
        [normal(m, shape.r) for m in ms],
        [1.0] * len(ms),
    )
    if shape.op == "forward":
        x = normal(shape.M, shape.n)
        return lambda: launch.forward(x, members, [None] * len(ms), chosen)
    dys, us = [normal(shape.M, m) for m in ms], [normal(shape.M, shape.r) for _ in ms]
    return lambda: launch.backward(dys, members, us, chosen, True, True)


def gpu_timer(call: Callable[[], object]) -> float:
    """Median time of a call in ms, by CUDA events: 10 ms of warm-up, then about 50 ms of repetitions."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def write(tuned: Sequence[TunedShape], arch: str, sms: int, gpu: str) -> Path:
    """Write the user's table: new rules, then the table's rules for other shapes. A layer's next call reads it."""
    plan.forget()  # plans are cached: read the table as it is on disk
    path = cache_dir() / "kernels" / f"{arch}.json"
    rules = [_rule(result, sms) for result in tuned]
    new_conditions = [rule["if"] for rule in rules]
    if plan.user_rules(arch):  # () for a broken table, which is overwritten
        old_rules = json.loads(path.read_text(encoding="utf-8"))["rules"]
        rules += [rule for rule in old_rules if rule.get("if") not in new_conditions]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"arch": arch, "gpu": gpu, "measured": True, "torch": torch.__version__, "rules": rules}
    write_text(path, json.dumps(table, indent=1) + "\n")
    plan.forget()  # and let the next call read the new one
    return path


def _rule(tuned: TunedShape, sms: int) -> dict[str, Any]:
    # M is a power of two (`plan.bucket`); the rule covers the bucket (M / 2, M].
    s, low = tuned.shape, tuned.shape.M // 2 + 1
    conditions = {"op": s.op, "dtype": s.dtype, "M": [low, s.M], "n": s.n, "m": s.m, "r": s.r, "members": s.members}
    gemm = {k: v for k, v in asdict(tuned.best.gemm).items() if v is not None}
    return {"if": {**conditions, "sms": sms}, "path": tuned.best.path, "prep": asdict(tuned.best.prep), "gemm": gemm}


def tune_model(model: str, r: int, tokens: Sequence[int], dtype: str) -> Table:
    """Tune the kernels for a model's layers on the first GPU, write the table, and return a summary to print."""
    if not torch.cuda.is_available() or missing():
        raise RuntimeError(f"lorasb bench tune needs a CUDA GPU and triton: {missing() or 'torch sees no GPU'}")
    if dtype == "auto":
        dtype = plan.DTYPES[native("cuda").dtype]
    if dtype not in plan.DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}: expected one of auto, {', '.join(plan.DTYPES.values())}")
    properties = torch.cuda.get_device_properties(0)
    arch, sms = f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
    shapes = list(shapes_of(layers_of(_without_weights(model)), r, tokens, dtype))
    tuned = tune(shapes, arch, sms, "cuda", gpu_timer)
    path = write(tuned, arch, sms, properties.name)
    return _summary(tuned, f"{properties.name}: {len(tuned)} shapes in {path}")


def _without_weights(model: str) -> nn.Module:
    """The model on the meta device: the sizes of its layers are known, and no weights are allocated or downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .prepare import resolve_model

    config = AutoConfig.from_pretrained(resolve_model(model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _summary(tuned: Sequence[TunedShape], title: str) -> Table:
    table = Table(title=title)
    for name in ("op", "tokens", "in", "out", "members", "path", "blocks", "before ms", "after ms"):
        table.add_column(name, justify="right")
    for result in tuned:
        s, g = result.shape, result.best.gemm
        blocks = f"{g.block_m}x{g.block_n}x{g.block_k}" if result.best.path == "fused" else "cuBLAS"
        numbers = (f"{result.before:.3f}", f"{result.after:.3f}")
        table.add_row(s.op, str(s.M), str(s.n), str(s.m), str(s.members), result.best.path, blocks, *numbers)
    return table
