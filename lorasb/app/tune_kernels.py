"""`lorasb bench tune`: times kernel paths and tiles for a model's layers on this GPU, and writes the user's table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn

from ..backends import autotune, eager
from ..backends.autotune import Check, Clock, CudaClock, Run, Tuned
from ..backends.triton import missing
from ..kernels import linear as launch
from ..kernels import linear_quantized, plan
from ..kernels.operands import Mask
from ..kernels.plan import Shape
from ..layers.linear_group import NAMES
from ..utils.precision import native
from .plan import on_meta
from .tables import table_of

OPS = ("forward", "backward")
DROPOUT, SEED = 0.05, 1 << 40
BLOCK = 64  # weights per NF4 block
Layer = tuple[int, tuple[int, ...]]  # in_features, and the out_features of each member
Case = tuple[Shape, tuple[int, ...]]  # and the out_features of each member


def cases_of(layers: Sequence[Layer], r: int, tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """Yield, for each layer or group, token bucket and direction, the plain, dropout and (for one layer) 4-bit case."""
    for n, ms in layers:
        for M in dict.fromkeys(plan.bucket(count) for count in tokens):
            for op in OPS:
                shape = Shape(op, dtype, M, n, sum(ms), r, len(ms))
                yield shape, ms
                if M >= autotune.LEAST_TOKENS:
                    yield replace(shape, dropout=True), ms
                if len(ms) == 1:
                    yield replace(shape, quant="4bit"), ms


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the distinct (in, outs) of all linears, and of groups that read the same x (q/k/v, gate/up)."""
    sizes: dict[Layer, None] = {}
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
        for child in children.values():
            sizes[(child.in_features, (child.out_features,))] = None
        for names in NAMES:
            members = [children[name] for name in names if name in children]
            if len(members) > 1 and len({m.in_features for m in members}) == 1:
                sizes[(members[0].in_features, tuple(m.out_features for m in members))] = None
    return list(sizes)


def tune(cases: Sequence[Case], arch: str, sms: int, device: str, clock: Clock) -> list[Tuned]:
    """Time every candidate of every case; what does not compile, run or fit into memory is skipped."""
    found = []
    for shape, ms in cases:
        try:
            run, check = run_of(shape, ms, device)
            plans = autotune.candidates(shape, plan.choose(shape, arch, sms), arch)
            found.append(autotune.fastest(shape, plans, run, check, clock))
        except torch.OutOfMemoryError:
            continue
    return [one for one in found if one is not None]


def run_of(shape: Shape, ms: Sequence[int], device: str) -> tuple[Run, Check]:
    """Return a function that runs one forward or backward by a plan on random tensors, and a check of its result."""
    dtype = next(kind for kind, name in plan.DTYPES.items() if name == shape.dtype)
    mask = Mask(DROPOUT, (SEED,) * len(ms)) if shape.dropout else Mask()

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device).to(kind)

    members = launch.Members(
        [None if shape.quant != "none" else normal(m, shape.n) for m in ms],
        [normal(shape.r, shape.n) for _ in ms],
        [normal(shape.r, shape.r, kind=torch.float32) for _ in ms],
        [normal(m, shape.r) for m in ms],
        [None] * len(ms),
        [1.0] * len(ms),
    )
    x, dys, us = normal(shape.M, shape.n), [normal(shape.M, m) for m in ms], [normal(shape.M, shape.r) for _ in ms]
    if shape.quant != "none":
        m, n = ms[0], shape.n
        packed = torch.randint(0, 256, (-(-m * n // 2),), dtype=torch.uint8, device=device)
        absmax, codebook = torch.rand(-(-m * n // BLOCK), device=device), torch.linspace(-1, 1, 16, device=device)
        # random codes, without nested statistics
        layout, tensors = (BLOCK, 256, 0), (packed, absmax, codebook)
        weight = linear_quantized.Quantized(tensors, layout, m, n)
        dense = members._replace(weights=[eager.dequantize([packed, absmax, codebook], list(layout), m, n, dtype)])
        if shape.op == "forward":
            run: Run = partial(linear_quantized.forward, x, weight, members, mask=mask)
            return run, lambda found: autotune.check_forward(x, dense, mask, ([found[0]], found[1]))
        run = partial(linear_quantized.backward, dys[0], weight, members, us[0], need=(True, True), mask=mask)
        return run, partial(autotune.check_backward, dys, dense, us, mask)
    if shape.op == "forward":
        return partial(launch.forward, x, members, mask=mask), partial(autotune.check_forward, x, members, mask)
    run = partial(launch.backward, dys, members, us, need_dx=True, need_dcore=True, mask=mask)
    return run, partial(autotune.check_backward, dys, members, us, mask)


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
    if not plan.is_known(arch):
        raise RuntimeError(f"{properties.name} ({arch}) uses cuBLAS, as lorasb's kernels were not tested on it")
    cases = list(cases_of(layers_of(on_meta(model, torch.float32)), r, tokens, dtype))
    tuned = tune(cases, arch, sms, "cuda", CudaClock(torch.device("cuda")))
    path = autotune.write(tuned, arch, sms)
    plan.forget()  # so that the next call reads the new table
    left = f"; {len(cases) - len(tuned)} left out (failed, or times varied)" if len(tuned) < len(cases) else ""
    return _summary(tuned, f"{properties.name}: {len(tuned)} shapes in {path}{left}")


def _summary(tuned: Sequence[Tuned], title: str) -> Table:
    names = ("tokens", "in", "out", "members", "kind", "path", "blocks", "before ms", "after ms")
    table = table_of(title, "op", *names)
    for result in tuned:
        s, g = result.shape, result.best.gemm
        blocks = f"{g.block_m}x{g.block_n}x{g.block_k}" if result.best.path != "addmm" else "cuBLAS"
        numbers = (f"{result.before:.3f}", f"{result.after:.3f}")
        kind = "4 bits" if s.quant != "none" else "dropout" if s.dropout else ""
        path = result.best.weights if s.quant != "none" else result.best.path
        table.add_row(s.op, str(s.M), str(s.n), str(s.m), str(s.members), kind, path, blocks, *numbers)
    return table
