"""Plan a run: the memory it needs, what a GPU or this machine has, and the mildest change that would make it fit.

The bytes of a training step are counted without allocating the model. It is created from its config on the meta device
and patched like any model. Then its tensors are replaced with torch's fake tensors, which have shapes but no storage:
the real code of the model, the layers and AdamW runs, and the memory it would hold is counted instead of guessed.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import cast

import psutil
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorasb

from ..compat.torch import fake_tensor_mode, storage_key
from ..compat.transformers import from_config
from ..distributed.process_group import Processes
from ..init.block_recorder import NotAStackError, find_stack
from ..init.plan import EFFICIENCY, accumulate_memory, boundary_bytes, layerwise_memory, measure, product_speed
from ..init.task import InitOptions, Piece, Work
from ..layers.adapted_layer import AdaptedLayer
from ..layers.linear4bit import LEFT_OUT
from ..layers.lookup import adapted_layers
from ..utils.checks import nearest
from ..utils.precision import DTYPES, native
from .prepare import check_positions, checkpoint_activations, resolve_model

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU."""

    title: str  # its full name
    memory: int  # bytes
    flops: float  # per second, dense products: bf16 with fp32 accumulation, or fp32 on GPUs without bf16
    bf16: bool = True  # True if it multiplies bf16: compute capability 8.0 or later


CARDS = {
    "t4": Card("NVIDIA T4", 16 * GIB, 8.1e12, bf16=False),
    "l4": Card("NVIDIA L4", 24 * GIB, 121e12),
    "a10": Card("NVIDIA A10", 24 * GIB, 125e12),
    "a30": Card("NVIDIA A30", 24 * GIB, 165e12),
    "a40": Card("NVIDIA A40", 48 * GIB, 150e12),
    "l40s": Card("NVIDIA L40S", 48 * GIB, 362e12),
    "a4000": Card("NVIDIA RTX A4000", 16 * GIB, 77e12),
    "a5000": Card("NVIDIA RTX A5000", 24 * GIB, 111e12),
    "a6000": Card("NVIDIA RTX A6000", 48 * GIB, 155e12),
    "6000ada": Card("NVIDIA RTX 6000 Ada", 48 * GIB, 364e12),
    "3060": Card("NVIDIA GeForce RTX 3060", 12 * GIB, 25e12),
    "3080": Card("NVIDIA GeForce RTX 3080", 10 * GIB, 60e12),
    "3090": Card("NVIDIA GeForce RTX 3090", 24 * GIB, 71e12),
    "4060ti": Card("NVIDIA GeForce RTX 4060 Ti 16GB", 16 * GIB, 44e12),
    "4070": Card("NVIDIA GeForce RTX 4070", 12 * GIB, 58e12),
    "4080": Card("NVIDIA GeForce RTX 4080", 16 * GIB, 97e12),
    "4090": Card("NVIDIA GeForce RTX 4090", 24 * GIB, 165e12),
    "5090": Card("NVIDIA GeForce RTX 5090", 32 * GIB, 209e12),
    "a100": Card("NVIDIA A100 40GB", 40 * GIB, 312e12),
    "a100-80": Card("NVIDIA A100 80GB", 80 * GIB, 312e12),
    "h100": Card("NVIDIA H100 SXM", 80 * GIB, 989e12),
    "h200": Card("NVIDIA H200", 141 * GIB, 989e12),
    "b200": Card("NVIDIA B200", 180 * GIB, 2250e12),
}


def find_gpu(name: str) -> Card:
    """Find a GPU by its short name in any spelling ("RTX A6000", "a6000", "A100-80GB")."""
    compact = {known.replace("-", ""): known for known in CARDS}
    key = re.sub(r"nvidia|geforce|rtx|quadro|gb|sxm|pcie|[^a-z0-9]", "", name.lower())
    if key in compact:
        return CARDS[compact[key]]
    hint = nearest(name.lower(), CARDS, f"known are {', '.join(CARDS)}", cutoff=0.4)
    raise ValueError(f"--gpu {name!r} is not known{hint}")


@dataclass(frozen=True)
class Request:
    """A run to plan."""

    model: str  # folder or hub id; only its config is read
    r: int | None = None  # rank; None for the library's default
    batch: int = 4  # rows computed at once
    seq: int = 512  # tokens per row
    bits: int = 16  # 16, or 4 for a base in NF4 with nested scales
    checkpointing: bool = False  # True if backward recomputes activations
    card: Card | None = None  # None for this machine's memory
    dtype: str | None = None  # of the base; None for the choice of `--dtype auto` on that device


def patched(request: Request) -> PeftModel:
    """Return the patched model on the meta device."""
    model = on_meta(request.model, dtype_of(request))
    try:
        return lorasb.patch(model, r=request.r)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{request.model} cannot be patched: {error}") from None


def dtype_of(request: Request) -> torch.dtype:
    """Return the dtype of the base."""
    if request.dtype is not None:
        return DTYPES[request.dtype]
    if request.card is not None:
        return torch.bfloat16 if request.card.bf16 else torch.float32
    return native("cpu").dtype


def on_meta(name: str, dtype: torch.dtype) -> nn.Module:
    """Create a model on the meta device, of the class named in its config."""
    try:
        config = transformers.AutoConfig.from_pretrained(resolve_model(name))
    except Exception as error:  # transformers raises errors of several types for invalid config values
        raise ValueError(
            f"cannot read the config of {name!r}, expected a folder or hub id: {_first_line(error)}"
        ) from None
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantized already: plan for its dense base, with --bits 4")
    named = (getattr(transformers, one, None) for one in config.architectures or ())
    kind = next((one for one in named if one is not None), None)
    try:
        with torch.device("meta"):
            if kind is None:
                return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            return from_config(kind, config, dtype)
    except Exception as error:  # likewise
        raise ValueError(
            f"{name}: no language model can be made of a {config.model_type} config: {type(error).__name__}: {error}"
        ) from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())


class LiveBytes(TorchDispatchMode):
    """Counts each storage that an operation returns once, until it is freed.

    Memory that a kernel allocates and frees within one operation is not counted. `now` is the number of bytes of live
    storages, `peak` its maximum since the block began or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Callable, _: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage_key(storage) not in self._seen:
                    self._seen[storage_key(storage)] = storage
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a training step of batch x seq tokens."""

    base: int  # the base model's parameters and buffers, before quantization
    factors: int  # A and B
    cores: int  # R
    optimizer: int  # R's gradients and AdamW's moments
    saved: int  # activations saved for backward, with the logits
    temporary: int  # other live tensors at the first step's peak


def count_step(model: PeftModel, batch: int, seq: int, checkpointing: bool = False) -> StepBytes:
    """Count the bytes of a training step, replacing the tensors of a patched meta-device model with fake ones."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            for state in module.adapters.values():
                state.initialized = True  # or the adapters could not be trained: nothing here has values
    if checkpointing:
        model.config.use_cache = False  # as transformers does with checkpointing
        checkpoint_activations(model.get_base_model())
    with fake_tensor_mode(), _GroupedProducts(), LiveBytes() as live:
        base, factors, cores = _become_fake(model)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        static = live.now
        ids = torch.zeros(batch, seq, dtype=torch.int64)
        loss = model(input_ids=ids, labels=ids)["loss"]
        del ids
        saved = live.now - static
        loss.backward()
        optimizer.step()
        del loss
        temporary = live.peak - base - factors - cores - saved
        return StepBytes(base, factors, cores, live.now - static, saved, temporary)


class _GroupedProducts(TorchDispatchMode):
    """Supports experts' grouped products in any dtype, as on a CPU; torch's fake version takes bf16 only."""

    def __torch_dispatch__(self, func: Callable, _: object, args: tuple = (), kwargs: dict | None = None) -> object:
        packet = getattr(func, "overloadpacket", None)
        if packet is None or packet is not getattr(torch.ops.aten, "_grouped_mm", None):
            return func(*args, **(kwargs or {}))
        narrow = [a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return func(*narrow, **(kwargs or {})).to(args[0].dtype)


def _become_fake(model: nn.Module) -> tuple[int, int, int]:
    """Replace all parameters and buffers with fake ones, tied ones once; return bytes of base, A and B, and R."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the originals alive, so that no id is reused
    sizes = [0, 0, 0]
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                    sizes[2 if ".lorasb_R" in name else 1 if ".lorasb_" in name else 0] += fake.nbytes
                tensors[key] = made[id(tensor)][1]
    return sizes[0], sizes[1], sizes[2]


NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: code, share of a scale, share of that scale's scale
CODEBOOKS = 4 * (16 + 256 + 1)  # bytes per weight tensor, independent of its size
CONTEXT = 500e6  # bytes that CUDA, its libraries and compiled kernels take on a card
KERNELS = 50e6  # bytes that MKL's and the extension's kernels keep on a CPU: 37 to 64 MB in twelve runs (Zen 3, Zen 5)
RESERVE = 0.1  # what allocators hold in addition, relative to what a step adds to the model (docs/planner.md)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # config fields for the number of experts
SAMPLES = 32  # of the initialization, unless there are more than 32,000 examples


@dataclass(frozen=True)
class MemoryPlan(StepBytes):
    """Bytes that a run needs, by use, with the base quantized if requested, and the time of a step."""

    request: Request
    scratch: int  # on a GPU with a 4-bit base, one dequantized weight
    context: int  # what CUDA takes on a GPU, or kernels hold on a CPU
    reserve: int  # what allocators hold beyond live tensors: a tenth of what a step adds to the model
    initialization: int  # peak of the initialization, with the base and the adapter
    available: int  # the card's bytes, or this machine's
    trained: int  # trained parameters
    flops: float  # per step
    # per step: on a GPU at its peak speed, which no step reaches; on this machine at the measured speed of a product of
    # the model's size
    seconds: float

    @property
    def step(self) -> int:
        """Peak bytes of a training step, including what allocators hold."""
        model = self.base + self.factors + self.cores + self.optimizer
        return model + self.saved + self.temporary + self.scratch + self.reserve + self.context

    @property
    def needed(self) -> int:
        """The larger peak of a training step and the initialization."""
        return max(self.step, self.initialization)

    @property
    def fits(self) -> bool:
        """True if both peaks fit into the available memory."""
        return self.needed <= self.available

    def to_json(self) -> dict[str, object]:
        """Return all fields and totals as plain values."""
        values = asdict(self)
        return values | {"step": self.step, "needed": self.needed, "fits": self.fits}


def plan_memory(request: Request) -> MemoryPlan:
    """Estimate the memory and time that a run needs."""
    model = patched(request)
    rows = torch.zeros(SAMPLES, request.seq, dtype=torch.int64, device="meta")
    pieces = [Piece({"input_ids": part, "labels": part}) for part in rows.split(request.batch)]
    work = Work(model, adapted_layers(model)[1], pieces, InitOptions(), Processes())
    check_positions(model, request.model, request.seq, "--max-length")  # fake tensors would not notice
    quantized = _quantizable(model) if request.bits == 4 else []
    if request.bits == 4 and not quantized:
        raise ValueError(f"--bits 4: {request.model} has no linear layer that lorasb.quantize would quantize")
    flops, (start, boundaries) = _flops(work, request), _initialization(work)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    try:
        counted = count_step(model, request.batch, request.seq, request.checkpointing)
    except (RuntimeError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{request.model}: a step of {request.batch} x {request.seq} tokens cannot be computed from tokens and "
            f"labels alone ({_first_line(error)})"
        ) from None
    dense = [weight.nbytes for weight in quantized]
    packed = sum(round(weight.numel() * NF4_NESTED) + CODEBOOKS for weight in quantized)
    base = counted.base - sum(dense) + packed
    if request.card is not None:
        available, context, speed = request.card.memory, round(CONTEXT), request.card.flops
    else:  # measure a product of a step's tokens and one layer's weight on this machine
        layer, tokens = next(iter(work.layers.values())), max(16, min(2048, request.batch * request.seq))
        shape = tokens, layer.out_features, layer.in_features
        available, context = psutil.virtual_memory().total, round(KERNELS)
        speed = product_speed(*shape, dtype_of(request), torch.device("cpu")) * EFFICIENCY
    initialization = base + counted.factors + counted.cores + round(start) + context
    if request.card is None or initialization + boundaries <= available:  # else the boundaries go to host memory
        initialization += round(boundaries)
    return MemoryPlan(
        **asdict(counted) | {"base": base},
        request=request,
        scratch=max(dense, default=0) if request.card else 0,
        context=context,
        reserve=round(RESERVE * (counted.saved + counted.temporary + counted.optimizer)),
        initialization=initialization,
        available=available,
        trained=trained,
        flops=flops,
        seconds=flops / speed,
    )


def smaller_plans(refused: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Yield the mildest change that makes a run fit: one option, then both, then fewer rows or tokens as well."""
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
            options = {
                f"--bits {other.bits}": other.bits != request.bits,
                "--gradient-checkpointing": other.checkpointing != request.checkpointing,
                f"--batch-size {other.batch}": other.batch != request.batch,
                f"--max-length {other.seq}": other.seq != request.seq,
            }
            yield " ".join(option for option, differs in options.items() if differs), found
            return


def _quantizable(model: PeftModel) -> list[torch.Tensor]:
    """Return the weights that `lorasb.quantize` would quantize to 4 bits."""
    head = cast(transformers.PreTrainedModel, model.get_base_model()).get_output_embeddings()
    layers = {name: m.get_base_layer() for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    return [
        layer.weight
        for name, layer in layers.items()
        if type(layer) is nn.Linear and layer is not head and name.rpartition(".")[2] not in LEFT_OUT
    ]


def _flops(work: Work, request: Request) -> float:
    """Count a step's operations: per weight and token 2 in forward and 2 in backward (dx, not dW); plus attention."""
    tokens = request.batch * request.seq
    text = work.model.config.get_text_config()  # type: ignore[union-attr, operator]
    width, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    weights = float(sum(layer.in_features * layer.out_features for layer in work.layers.values()))
    weights += getattr(text, "vocab_size", 0) * width
    # Experts' parameters are 3-D; a token goes through some of them.
    stacked = sum(p.numel() for name, p in work.model.named_parameters() if p.dim() == 3 and "lorasb_" not in name)
    if experts := next((n for field in EXPERTS if (n := getattr(text, field, None))), 0):
        weights += stacked * getattr(text, "num_experts_per_tok", 1) / experts
    passes = 4 + (2 if request.checkpointing else 0)
    attention = (passes // 2 + 1) * 2 * tokens * request.seq * width * layers
    return float(passes * weights * tokens + attention)


def _initialization(work: Work) -> tuple[float, float]:
    """Return the peak bytes of the initialization at the step's micro-batch size, and those of the blocks' inputs."""
    sizes = measure(work, work.model.config.get_text_config())  # type: ignore[union-attr, operator]
    try:
        stack = find_stack(work.model, work.layers)
    except NotAStackError:
        return accumulate_memory(work, sizes, 0.0), 0.0
    return layerwise_memory(work, stack, sizes), boundary_bytes(stack, sizes)
