"""Plan of a run: what it needs, what a card or this machine has, and the first changes that would make it fit."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from ..compat import transformers as private
from ..distributed.process_group import Processes
from ..init.block_recorder import NotAStackError, find_stack
from ..init.plan import EFFICIENCY, Sizes, accumulate_memory, boundary_bytes, layerwise_memory, product_speed
from ..init.task import InitOptions, Work
from ..layers.linear4bit import LEFT_OUT
from ..layers.lookup import adapted_layers
from ..utils.precision import native
from .fake_step import StepBytes, count_step
from .prepare import resolve_model

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card."""

    title: str  # its full name
    memory: int  # bytes
    flops: float  # of dense products a second: of bf16 with sums in fp32, or of fp32 where there is no bf16
    bf16: bool = True  # whether it multiplies bf16, as cards from compute capability 8.0 on do


def _card(title: str, gib: float, teraflops: float) -> Card:
    return Card(title, int(gib * GIB), teraflops * 1e12)


CARDS = {
    "t4": Card("NVIDIA T4", 16 * GIB, 8.1e12, bf16=False),
    "l4": _card("NVIDIA L4", 24, 121),
    "a10": _card("NVIDIA A10", 24, 125),
    "a30": _card("NVIDIA A30", 24, 165),
    "a40": _card("NVIDIA A40", 48, 150),
    "l40s": _card("NVIDIA L40S", 48, 362),
    "a4000": _card("NVIDIA RTX A4000", 16, 77),
    "a5000": _card("NVIDIA RTX A5000", 24, 111),
    "a6000": _card("NVIDIA RTX A6000", 48, 155),
    "6000ada": _card("NVIDIA RTX 6000 Ada", 48, 364),
    "3060": _card("NVIDIA GeForce RTX 3060", 12, 25),
    "3080": _card("NVIDIA GeForce RTX 3080", 10, 60),
    "3090": _card("NVIDIA GeForce RTX 3090", 24, 71),
    "4060ti": _card("NVIDIA GeForce RTX 4060 Ti 16GB", 16, 44),
    "4070": _card("NVIDIA GeForce RTX 4070", 12, 58),
    "4080": _card("NVIDIA GeForce RTX 4080", 16, 97),
    "4090": _card("NVIDIA GeForce RTX 4090", 24, 165),
    "5090": _card("NVIDIA GeForce RTX 5090", 32, 209),
    "a100": _card("NVIDIA A100 40GB", 40, 312),
    "a100-80": _card("NVIDIA A100 80GB", 80, 312),
    "h100": _card("NVIDIA H100 SXM", 80, 989),
    "h200": _card("NVIDIA H200", 141, 989),
    "b200": _card("NVIDIA B200", 180, 2250),
}


def find_gpu(name: str) -> Card:
    """A card by its short name, however it is written ("RTX A6000", "a6000", "A100-80GB")."""
    compact = {known.replace("-", ""): known for known in CARDS}
    key = re.sub(r"nvidia|geforce|rtx|quadro|gb|sxm|pcie|[^a-z0-9]", "", name.lower())
    if key in compact:
        return CARDS[compact[key]]
    near = difflib.get_close_matches(key, compact, n=3, cutoff=0.4) or list(compact)
    raise ValueError(f"--gpu {name!r} is not known: did you mean {' or '.join(compact[one] for one in near)}?")


@dataclass(frozen=True)
class Request:
    """A run that is planned.

    Attributes:
        batch, seq: rows of a step that are computed at once, and tokens of each.
    """

    model: str  # folder or hub id; its config alone is read
    r: int | None = None  # rank; None for the library's default
    batch: int = 4
    seq: int = 512
    bits: int = 16  # 16, or 4 for a base in NF4 with nested scales
    checkpointing: bool = False  # whether activations are computed again in backward
    card: Card | None = None  # None for this machine's memory
    dtype: str | None = None  # of the base; None for what `--dtype auto` takes there


def patched(request: Request) -> Any:
    """The patched model on the meta device."""
    import lorasb

    model = _on_meta(request.model, dtype_of(request))
    try:
        return lorasb.patch(model, r=request.r)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{request.model} cannot be patched: {error}") from None


def dtype_of(request: Request) -> torch.dtype:
    """Return the dtype of the base."""
    if request.dtype is not None:
        found: torch.dtype = getattr(torch, request.dtype)
        return found
    if request.card is not None:
        return torch.bfloat16 if request.card.bf16 else torch.float32
    return native("cpu").dtype


def _on_meta(name: str, dtype: torch.dtype) -> nn.Module:
    """A model without memory, of the class that its checkpoint names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(resolve_model(name))
    except Exception as error:  # for values that transformers refuses in a config, which have other types
        first = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"cannot read the config of {name!r}, expected a folder or hub id: {first}") from None
    named = [getattr(transformers, one, None) for one in config.architectures or ()]
    kind = next((one for one in named if one is not None), None)
    try:
        with torch.device("meta"):
            if kind is not None:
                model = private.from_config(kind, config, dtype)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # likewise
        kind_of_error = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{name}: no language model can be made of a {config.model_type} config: {kind_of_error}"
        ) from None
    return model


NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: its code, its share of a scale, and of the scale's own
CODEBOOKS = 4 * (16 + 256 + 1)  # bytes of each weight's own, whatever its size
CONTEXT = 500e6  # bytes that CUDA, its libraries and compiled kernels take on a card
KERNELS = 50e6  # bytes that MKL's and the extension's kernels keep on a CPU: 37 to 64 MB in twelve runs (Zen 3, Zen 5)
RESERVE = 0.1  # share that allocators hold beyond what a step adds to the model (docs/planner.md)
POSITIONS = ("wpe", "position_embeddings", "embed_positions")  # names of tables of learned positions
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of their number in configs
SAMPLES = 32  # of the initialization, unless there are more than 32,000 examples


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs, by what holds them, and seconds.

    Attributes:
        factors, cores: A and B, and R.
        step: peak of a training step.
    """

    request: Request
    base: int  # the base model, quantized if asked for
    factors: int
    cores: int
    optimizer: int  # R's gradients and AdamW's moments
    saved: int  # activations that the forward leaves for backward, logits included
    temporary: int  # what else is alive at a step's worst moment
    scratch: int  # on a card, one dequantized weight, where the base has 4 bits
    context: int  # what CUDA takes on a card, or kernels keep on a CPU
    reserve: int  # what allocators hold beyond live tensors: a tenth of what a step adds to the model
    initialization: int  # peak of the initialization, with the base and the adapter
    available: int  # the card's bytes, or this machine's
    trained: int  # trained parameters
    flops: float  # of a step
    # of a step: on a card at its own peak, which no step reaches; on this machine at the speed of a product of the
    # model's own size, which is measured
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


def plan_memory(request: Request) -> MemoryPlan:
    """Memory and time that a run needs."""
    model = patched(request)
    work = Work(model, adapted_layers(model)[1], [], InitOptions(), Processes())
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
    initialization = base + counted.factors + counted.cores + round(start) + context
    if request.card is None or initialization + boundaries <= available:  # else they go to the host
        initialization += round(boundaries)
    return MemoryPlan(
        request=request,
        base=base,
        factors=counted.factors,
        cores=counted.cores,
        optimizer=counted.optimizer,
        saved=counted.saved,
        temporary=temporary,
        scratch=max(dense, default=0) if request.card else 0,
        context=context,
        reserve=round(RESERVE * (counted.saved + temporary + counted.optimizer)),
        initialization=initialization,
        available=available,
        trained=trained,
        flops=flops,
        seconds=flops / (request.card.flops if request.card else speed(work, request) * EFFICIENCY),
    )


def smaller_plans(refused: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
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
        if other != request and (found := plan_memory(other)).fits:
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


EVENING = 3 * 3600.0  # seconds
TOKENS = 1e6  # of training: 2,000 examples of 500
OPERATIONS = 4  # a parameter and token: forward, and backward for dx
WORKING_SHARE = 0.6  # of the memory that weights may take: the rest is a step's activations
BYTES = {"16": 2.0, "4": 0.6}  # a parameter, with embeddings that stay in 16 bits


def prospects() -> str:
    """The sentence that `lorasb doctor` ends with."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        sixteen, four = (_billions(WORKING_SHARE * memory / size) for size in BYTES.values())
        return (
            f"This machine is good for fine-tuning models of up to about {sixteen} billion parameters in 16 bits and "
            f"{four} in 4 bits on its GPU; lorasb plan MODEL says what one of them takes."
        )
    dtype = getattr(torch, native("cpu").name)
    in_time = EVENING * EFFICIENCY * product_speed(512, 2048, 2048, dtype, torch.device("cpu")) / (OPERATIONS * TOKENS)
    in_memory = WORKING_SHARE * psutil.virtual_memory().total / dtype.itemsize
    return (
        f"This machine is good for fine-tuning models of up to about {_billions(min(in_time, in_memory))} billion "
        "parameters on a million tokens in an evening, on its CPU; lorasb plan MODEL says what one of them takes."
    )


def _billions(parameters: float) -> str:
    """Rounded down to one digit: 0.7, 3, 20."""
    digit = 10.0 ** math.floor(math.log10(parameters))
    return f"{math.floor(parameters / digit) * digit / 1e9:g}"
