"""What a run needs, against what a card or this machine has, and the first changes that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from ...distributed.process_group import Processes
from ...init.gradients.block_stack import NotAStackError, find_stack
from ...init.gradients.cost_model import (
    EFFICIENCY,
    Sizes,
    accumulate_memory,
    boundary_bytes,
    layerwise_memory,
    product_speed,
)
from ...init.gradients.task import Work
from ...layers.lookup import adapted_layers
from ...layers.quantize import LEFT_OUT
from .fake_step import StepBytes, count_step
from .heap_trial import heap_trial
from .request import Request, dtype_of, patched

NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: its code, its share of a scale, and of the scale's own
CODEBOOKS = 4 * (16 + 256 + 1)  # bytes of each weight's own, whatever its size
CONTEXT = 500e6  # bytes that CUDA, its libraries and compiled kernels take on a card
KERNELS = 50e6  # bytes that MKL's and the extension's kernels keep on a CPU: 37 to 64 MB in twelve runs (Zen 3, Zen 5)
RESERVE = 0.1  # share that allocators hold beyond live tensors, where malloc cannot be asked
POSITIONS = ("wpe", "position_embeddings", "embed_positions")  # names of tables of learned positions
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of their number in configs
SAMPLES = 32  # of the initialization, unless there are more than 32,000 examples


@dataclass(frozen=True)
class Plan:
    """Bytes that a run needs, by what holds them, and seconds.

    Attributes:
        base: the base model, quantized if asked for.
        factors, cores: A and B, and R.
        optimizer: R's gradients and AdamW's moments.
        saved: activations that the forward leaves for backward, logits included.
        temporary: what else is alive at a step's worst moment.
        scratch: on a card, one dequantized weight, where the base has 4 bits.
        context: what CUDA takes on a card, or kernels keep on a CPU.
        reserve: what allocators hold beyond live tensors.
        asked: whether malloc was asked for that; a tenth of what a step adds to the model, if not.
        initialization: peak of the initialization, with the base and the adapter.
        step: peak of a training step.
        available: the card's bytes, or this machine's.
        trained: trained parameters.
        flops: of a step.
        seconds: of a step: on a card at its own peak, which no step reaches; on this machine at the speed of a product
            of the model's own size, which is measured.
    """

    request: Request
    base: int
    factors: int
    cores: int
    optimizer: int
    saved: int
    temporary: int
    scratch: int
    context: int
    reserve: int
    asked: bool
    initialization: int
    available: int
    trained: int
    flops: float
    seconds: float

    @property
    def step(self) -> int:
        """Peak bytes of a training step, with what allocators hold."""
        live = self.base + self.factors + self.cores + self.optimizer + self.saved + self.temporary + self.scratch
        return live + self.reserve + self.context

    @property
    def needed(self) -> int:
        """The larger of the two peaks."""
        return max(self.step, self.initialization)

    @property
    def fits(self) -> bool:
        """True if both are below what is available."""
        return self.needed <= self.available

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        values = asdict(self)
        return values | {"step": self.step, "needed": self.needed, "fits": self.fits}


def plan(request: Request) -> Plan:
    """What a run needs.

    Raises:
        ValueError: no config can be read, or the model is not one that this can run on tokens.
    """
    with heap_trial(request) as held:
        return _plan(request, held)


def _plan(request: Request, held: Callable[[], int | None]) -> Plan:
    """`held`: what malloc would hold, which is asked last, as its process runs beside this one."""
    model = patched(request)
    work = Work(model, adapted_layers(model)[1], [], None, Processes())
    _check_positions(model, request)
    quantized = _quantizable(model) if request.bits == 4 else []
    if request.bits == 4 and not quantized:
        raise ValueError(f"--bits 4: {request.model} has no linear layer that lorasb.quantize would take")
    flops, (start, boundaries) = _flops(work, request), _initialization(work, request)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counted = _counted(model, request)
    dense = [weight.numel() * weight.element_size() for weight in quantized]
    packed = sum(round(weight.numel() * NF4_NESTED) + CODEBOOKS for weight in quantized)
    base = counted.base - sum(dense) + packed
    static = counted.base + counted.factors + counted.cores
    # AdamW's state is there from the second step on, at that one's worst moment
    temporary = counted.peak - static - counted.saved
    available, context = psutil.virtual_memory().total, round(KERNELS)
    if request.card is not None:
        available, context = request.card.memory, round(CONTEXT)
    holes = held()
    reserve = round(RESERVE * (counted.saved + temporary + counted.optimizer)) if holes is None else holes
    initialization = base + counted.factors + counted.cores + round(start) + context
    if request.card is None or initialization + boundaries <= available:  # else they go to the host
        initialization += round(boundaries)
    return Plan(
        request=request,
        base=base,
        factors=counted.factors,
        cores=counted.cores,
        optimizer=counted.optimizer,
        saved=counted.saved,
        temporary=temporary,
        scratch=max(dense, default=0) if request.card else 0,
        context=context,
        reserve=reserve,
        asked=holes is not None,
        initialization=initialization,
        available=available,
        trained=trained,
        flops=flops,
        seconds=flops / (request.card.flops if request.card else speed(work, request) * EFFICIENCY),
    )


def changes(refused: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that make a run fit, the mildest first: each alone, then together, then with fewer tokens at once."""
    request = refused.request
    bits = 4 if _quantizable(patched(request)) else request.bits
    smaller = replace(request, checkpointing=True, bits=bits)
    tried = [replace(request, checkpointing=True), replace(request, bits=bits), smaller]
    while smaller.batch > 1:
        smaller = replace(smaller, batch=smaller.batch // 2)
        tried.append(smaller)
    while smaller.seq > 256:
        smaller = replace(smaller, seq=smaller.seq // 2)
        tried.append(smaller)
    for other in dict.fromkeys(tried):
        if other != request and (found := plan(other)).fits:
            yield _difference(request, other), found
            return


def _difference(request: Request, other: Request) -> str:
    """The options that differ, as they are typed."""
    parts = []
    if other.bits != request.bits:
        parts.append(f"--bits {other.bits}")
    if other.checkpointing and not request.checkpointing:
        parts.append("--gradient-checkpointing")
    for name in ("batch", "seq"):
        if getattr(other, name) != getattr(request, name):
            parts.append(f"--{name} {getattr(other, name)}")
    return " ".join(parts)


def _counted(model: nn.Module, request: Request) -> StepBytes:
    try:
        return count_step(model, request.batch, request.seq, request.checkpointing)
    except (RuntimeError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        first = " ".join(str(error).split("\n")[0].split())
        raise ValueError(
            f"{request.model}: a step of {request.batch} x {request.seq} tokens cannot be computed from tokens and "
            f"labels alone ({first})"
        ) from None


def _quantizable(model: Any) -> list[torch.Tensor]:
    """The weights that `lorasb.quantize` would put into 4 bits."""
    head = model.get_base_model().get_output_embeddings()
    layers = {id(m.get_base_layer()): m.get_base_layer() for _, m in model.named_modules() if hasattr(m, "lorasb_R")}
    names = {id(m): n for n, m in model.named_modules()}
    return [
        layer.weight
        for key, layer in layers.items()
        if type(layer) is nn.Linear and layer is not head and names[key].split(".")[-2] not in LEFT_OUT
    ]


def _flops(work: Work, request: Request) -> float:
    """Operations of a step: 2 a weight and token in forward, 2 in backward for dx, none for dW, and attention's."""
    tokens = request.batch * request.seq
    config = getattr(work.model, "config", None)
    text = config.get_text_config() if config is not None else None
    width, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    weights = float(sum(layer.in_features * layer.out_features for layer in work.layers.values()))
    weights += getattr(text, "vocab_size", 0) * width + _expert_weights(work.model, text)
    passes = 4 + (2 if request.checkpointing else 0)
    attention = (passes // 2 + 1) * 2 * tokens * request.seq * width * layers
    return float(passes * weights * tokens + attention)


def _expert_weights(model: nn.Module, config: Any) -> float:
    """Weights of experts whose parameters are 3-D, those that a token goes through."""
    stacked = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3 and "lorasb_" not in name)
    experts = next((n for field in EXPERTS if (n := getattr(config, field, None))), 0)
    return stacked * getattr(config, "num_experts_per_tok", 1) / experts if experts else 0.0


def _check_positions(model: nn.Module, request: Request) -> None:
    """Raise where a row is longer than a table of learned positions, which fake tensors do not notice."""
    for name, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS
        if learned and request.seq > module.num_embeddings:
            raise ValueError(
                f"{request.model} has {module.num_embeddings} learned positions, got --seq {request.seq}: take less"
            )


def speed(work: Work, request: Request) -> float:
    """Operations a second of a product on this machine, with the tokens of a step and a layer's weight."""
    layer, tokens = next(iter(work.layers.values())), max(16, min(2048, request.batch * request.seq))
    return product_speed(tokens, layer.out_features, layer.in_features, dtype_of(request), torch.device("cpu"))


def _initialization(work: Work, request: Request) -> tuple[float, float]:
    """Peak bytes of the initialization in micro-batches of the step's size, and those of the blocks' inputs."""
    config = work.model.config.get_text_config()  # type: ignore[union-attr, operator]
    itemsize = dtype_of(request).itemsize
    width = getattr(config, "hidden_size", next(iter(work.layers.values())).in_features)
    linears = sum(layer.in_features + layer.out_features for layer in work.layers.values())
    sizes = Sizes(
        tokens=SAMPLES * request.seq,
        largest=request.batch * request.seq,
        samples=SAMPLES,
        rows=request.batch,
        width=width,
        itemsize=itemsize,
        activations=linears * itemsize * 1.5,
        head=getattr(config, "vocab_size", 0) * (2 * itemsize + 8),
        masks=0.0,
    )
    try:
        stack = find_stack(work.model, work.layers)
    except NotAStackError:
        return accumulate_memory(work, sizes, 0.0), 0.0
    return layerwise_memory(work, stack, sizes), boundary_bytes(stack, sizes)
