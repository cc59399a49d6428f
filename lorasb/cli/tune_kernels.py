"""`lorasb bench tune`: time the kernels' paths and blocks on this GPU, once, and write the user's table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..backends.triton.linear import missing
from ..kernels import linear as launch
from ..kernels import plan
from ..kernels.block_sizes import DECODE_ROWS, GemmConfig, PrepConfig
from ..kernels.plan import Plan, Shape
from ..utils.atomic_files import write_text
from ..utils.cache_dir import cache_dir
from ..utils.precision import native

Timer = Callable[[Callable[[], object]], float]
OPS = ("forward", "backward")
PREPS = (PrepConfig(32, 64, 4, 3), PrepConfig(64, 64, 4, 3), PrepConfig(64, 32, 4, 4), PrepConfig(128, 32, 8, 3))
GEMMS = (
    GemmConfig(128, 128, 32, 8, 8, 4, 128),
    GemmConfig(128, 128, 32, 8, 4, 4),
    GemmConfig(128, 128, 64, 8, 8, 3),
    GemmConfig(128, 64, 64, 8, 4, 3),
    GemmConfig(64, 128, 64, 8, 4, 3),
    GemmConfig(64, 64, 32, 8, 4, 4),
)
DECODE_GEMMS = (GemmConfig(16, 64, 64, 1, 4, 3), GemmConfig(16, 32, 128, 1, 4, 4), GemmConfig(16, 128, 64, 1, 4, 4))


@dataclass(frozen=True)
class Found:
    """The best plan for a shape, and its time over the table's choice before."""

    shape: Shape
    best: Plan
    before: float
    after: float


def shapes_of(
    layers: Sequence[tuple[int, tuple[int, ...]]], r: int, tokens: Sequence[int], dtype: str
) -> Iterator[Shape]:
    """A shape for each layer or group (in, outs), each bucket of tokens and each direction."""
    for n, ms in dict.fromkeys(layers):
        for M in dict.fromkeys(plan.bucket(count) for count in tokens):
            yield from (Shape(op, dtype, M, n, sum(ms), r, len(ms)) for op in OPS)


def layers_of(model: nn.Module) -> list[tuple[int, tuple[int, ...]]]:
    """(in, outs) of every linear and of every group that reads the same x."""
    from ..layers.linear_group import NAMES

    found: dict[tuple[int, tuple[int, ...]], None] = {}
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
        for child in children.values():
            found[(child.in_features, (child.out_features,))] = None
        for names in NAMES:
            members = [children[name] for name in names if name in children]
            if len(members) > 1 and len({m.in_features for m in members}) == 1:
                found[(members[0].in_features, tuple(m.out_features for m in members))] = None
    return list(found)


def candidates(shape: Shape, chosen: Plan) -> Iterator[Plan]:
    """What the table takes now, then every other path and blocks."""
    yield chosen
    yield Plan("addmm" if chosen.path == "fused" else "fused", chosen.prep, chosen.gemm)
    gemms = DECODE_GEMMS if shape.M <= DECODE_ROWS else GEMMS
    yield from (Plan("fused", chosen.prep, gemm) for gemm in gemms if gemm != chosen.gemm)
    if shape.M > DECODE_ROWS:
        yield from (Plan(chosen.path, prep, chosen.gemm) for prep in PREPS if prep != chosen.prep)


def tune(shapes: Sequence[Shape], arch: str, sms: int, device: str, timer: Timer) -> list[Found]:
    """Time every candidate of every shape; those that do not compile here are left out.

    Args:
        shapes: what to time.
        arch: architecture whose table is the start, "sm_86".
        sms: its multiprocessors.
        device: where to run.
        timer: from a call to its time, in any unit.
    """
    found = []
    for shape in shapes:
        chosen = plan.choose(shape, arch, sms)
        times: dict[Plan, float] = {}
        for candidate in candidates(shape, chosen):
            try:
                times[candidate] = timer(_call(shape, candidate, device))
            except Exception:  # blocks, or a shape, that this GPU has no room for
                continue
        if times:
            best = min(times, key=times.__getitem__)
            found.append(Found(shape, best, times.get(chosen, float("inf")), times[best]))
    return found


def _call(shape: Shape, chosen: Plan, device: str) -> Callable[[], object]:
    """One forward or backward of this shape by this plan."""
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
    """Median milliseconds by CUDA events, after a warm-up."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def write(found: Sequence[Found], arch: str, sms: int, gpu: str) -> Path:
    """Write a user's table: these rules, then what was there for other shapes. The next call of a layer reads it."""
    plan.forget()
    path = cache_dir() / "kernels" / f"{arch}.json"
    rules = [_rule(one, sms) for one in found]
    fresh = [rule["if"] for rule in rules]
    if plan.user_rules(arch):  # a table that is broken is written anew
        rules += [rule for rule in json.loads(path.read_text(encoding="utf-8"))["rules"] if rule.get("if") not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"arch": arch, "gpu": gpu, "measured": True, "torch": torch.__version__, "rules": rules}
    write_text(path, json.dumps(table, indent=1) + "\n")
    plan.forget()
    return path


def _rule(found: Found, sms: int) -> dict[str, Any]:
    s, low = found.shape, found.shape.M // 2 + 1
    conditions = {"op": s.op, "dtype": s.dtype, "M": [low, s.M], "n": s.n, "m": s.m, "r": s.r, "members": s.members}
    gemm = {k: v for k, v in asdict(found.best.gemm).items() if v is not None}
    return {"if": {**conditions, "sms": sms}, "path": found.best.path, "prep": asdict(found.best.prep), "gemm": gemm}


def tune_model(model: str, r: int, tokens: Sequence[int], dtype: str) -> Table:
    """Tune for the layers of a model on the first GPU, write the table, and show what changed.

    Raises:
        RuntimeError: there is no CUDA GPU, or no triton.
        ValueError: an unknown dtype.
    """
    if not torch.cuda.is_available() or missing():
        raise RuntimeError(f"lorasb bench tune needs a CUDA GPU and triton: {missing() or 'torch sees no GPU'}")
    if dtype == "auto":
        dtype = plan.DTYPES[native("cuda").dtype]
    if dtype not in plan.DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}: expected one of auto, {', '.join(plan.DTYPES.values())}")
    properties = torch.cuda.get_device_properties(0)
    arch, sms = f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
    shapes = list(shapes_of(layers_of(_skeleton(model)), r, tokens, dtype))
    found = tune(shapes, arch, sms, "cuda", gpu_timer)
    path = write(found, arch, sms, properties.name)
    return _view(found, f"{properties.name}: {len(found)} shapes in {path}")


def _skeleton(model: str) -> nn.Module:
    """The model without weights: its layers' sizes are all that is needed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..recipes.bundled_model import resolve_model

    config = AutoConfig.from_pretrained(resolve_model(model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _view(found: Sequence[Found], title: str) -> Table:
    view = Table(title=title)
    for name in ("op", "tokens", "in", "out", "members", "path", "blocks", "before ms", "after ms"):
        view.add_column(name, justify="right")
    for one in found:
        s, g = one.shape, one.best.gemm
        blocks = f"{g.block_m}x{g.block_n}x{g.block_k}" if one.best.path == "fused" else "cuBLAS"
        numbers = (f"{one.before:.3f}", f"{one.after:.3f}")
        view.add_row(s.op, str(s.M), str(s.n), str(s.m), str(s.members), one.best.path, blocks, *numbers)
    return view
