"""vLLM: its LoRA layers and manager with slots that hold only R; every name of vLLM that lorasb uses is here.

vLLM makes the layers, chooses slots, evicts and pins adapters, and maps tokens to slots. lorasb replaces what a slot
holds, what is read from an adapter's folder, and the product.
"""

from __future__ import annotations

import importlib
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import Private, find

VERIFIED = "vLLM 0.31 and 0.32"
VERSIONS = ">=0.31,<0.33"
_AS_LORA = "export the adapters (lorasb.export_lora) and serve them as plain LoRAs"
_LAYERS, _WORKER, _MANAGER = "vllm.lora.layers", "vllm.lora.worker_manager", "vllm.lora.model_manager"
_PUNICA, _LINEAR = "vllm.lora.punica_wrapper.punica_base", f"{_LAYERS}.base_linear.BaseLinearLayerWithLoRA"
_LRU = f"{_WORKER}.LRUCacheWorkerLoRAManager"
# each wraps a vLLM linear; the other classes are for embeddings, heads, experts and sharded A's
LAYERS = (
    *("ColumnParallelLinearWithLoRA", "MergedColumnParallelLinearWithLoRA", "RowParallelLinearWithLoRA"),
    *("QKVParallelLinearWithLoRA", "MergedQKVParallelLinearWithLoRA", "ReplicatedLinearWithLoRA"),
)
PRIVATE = {
    key: Private(name, use, "the server does not start, and names what to install or how to export")
    for key, name, use in (
        ("classes", "vllm.lora.utils._all_lora_classes", "classes by which vLLM replaces linears"),
        ("create", f"{_LINEAR}.create_lora_weights", "overridden: slots of R, without A and B"),
        ("set", f"{_LINEAR}.set_lora", "overridden: writes R into a slot"),
        ("reset", f"{_LINEAR}.reset_lora", "overridden: R = 0"),
        ("apply", f"{_LINEAR}._apply_lora_to_output", "overridden: adds B R A x"),
        ("runner", "vllm.v1.worker.lora_model_runner_mixin.LRUCacheWorkerLoRAManager", "replaced by a subclass"),
        ("load", f"{_LRU}._load_adapter", "overridden: reads R from a folder"),
        ("activate", f"{_LRU}._apply_adapters", "overridden: does not copy the registry for every adapter of a step"),
        ("manager", f"{_LRU}()._adapter_manager", "its `modules`, `packed_modules` and caches"),
        ("active", f"{_MANAGER}.LoRAModelManager()._active_adapters", "which adapters are in slots"),
        ("registered", f"{_MANAGER}.LoRAModelManager()._registered_adapters", "which adapters are loaded"),
        ("indices", f"{_PUNICA}.PunicaWrapperBase()._token_lora_indices", "slot of every token"),
        ("stream", f"{_LINEAR}()._enable_aux_cuda_stream", "set to False: the adapter follows the base"),
        ("map", "vllm.model_executor.models.utils.WeightsMapper._map_name", "names of layers that vLLM renames"),
    )
}
# parameters of called and overridden functions, as far as they are used
SIGNATURES = {
    f"{_LINEAR}.create_lora_weights": ("self", "max_loras", "lora_config", "model_config"),
    f"{_LINEAR}.set_lora": ("self", "index", "lora_a", "lora_b"),
    f"{_LINEAR}.reset_lora": ("self", "index"),
    f"{_LINEAR}._apply_lora_to_output": ("self", "x", "output"),
    f"{_LRU}.create_lora_manager": ("self", "model", "vllm_config"),
    f"{_LRU}._load_adapter": ("self", "lora_request"),
    f"{_LRU}._apply_adapters": ("self", "lora_requests"),
    "vllm.lora.lora_model.LoRAModel.__init__": ("self", "lora_model_id", "rank", "loras"),
    "vllm.lora.lora_weights.LoRALayerWeights.__init__": (
        *("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
    ),
    **{f"{_LAYERS}.{name}.slice_lora_{part}": ("self", f"lora_{part}") for name in LAYERS for part in "ab"},
}


class Parts(NamedTuple):
    """Functions and classes of `lorasb.vllm`, a level above this module, that the plugin computes with."""

    read_basis: Callable[[], Any]  # -> digest, factors by layer, r
    check_base: Callable[[Any, Path], None]
    read_cores: Callable[[Path, Any, torch.dtype], dict[str, Tensor]]  # folder, basis -> R by layer
    make_slots: Callable[..., Any]


def missing() -> list[str]:
    """Names of vLLM that this module needs and the installed version does not have, or has with other parameters."""
    gone = []
    for name in (one.name for one in PRIVATE.values()):
        owner, _, attribute = name.partition("().")
        found = find(Private(owner, "", ""))
        # only instances have an attribute: look for it in the source of the class and its parents
        parents = getattr(found, "__mro__", ())[:-1] if attribute else ()
        if found is None or (attribute and not any(f"self.{attribute}" in inspect.getsource(one) for one in parents)):
            gone.append(name)
    for name, parameters in SIGNATURES.items():
        found = find(Private(name, "", ""))
        if found is None or tuple(inspect.signature(found).parameters)[: len(parameters)] != parameters:
            gone.append(f"{name}({', '.join(parameters)})")
    return gone


def install(parts: Parts) -> None:
    """Let vLLM make layers and managers whose slots hold R. A second call in a process does nothing."""
    runner = _vllm("v1.worker.lora_model_runner_mixin")
    if hasattr(runner.LRUCacheWorkerLoRAManager, "lorasb_parts"):
        return
    layers, utils = _vllm("lora.layers"), _vllm("lora.utils")
    swapped = {}
    for name in LAYERS:
        of_vllm = getattr(layers, name)
        swapped[of_vllm] = type(f"LoRASB{name}", (_SlotsOfCores, of_vllm), {})
    utils._all_lora_classes = tuple(swapped.get(one, one) for one in utils._all_lora_classes)
    manager = type("LoRASBManager", (_Manager, runner.LRUCacheWorkerLoRAManager), {"lorasb_parts": parts})
    runner.LRUCacheWorkerLoRAManager = manager
    _define_op()


def _define_op() -> None:
    """`vllm::lorasb_add`: the product as one node of vLLM's compiled graph, which finds the layer by its name."""
    context = _vllm("forward_context").get_forward_context

    def lorasb_add(y: Tensor, x: Tensor, name: str) -> None:
        context().no_compile_layers[name].add(y, x)

    def fake(y: Tensor, x: Tensor, name: str) -> None:
        return None

    # the op's schema is read from annotations, which `from __future__ import annotations` has turned into text
    for function in (lorasb_add, fake):
        function.__annotations__ = {"y": Tensor, "x": Tensor, "name": str, "return": None}
    register = _vllm("utils.torch_utils").direct_register_custom_op
    register(op_name="lorasb_add", op_func=lorasb_add, mutates_args=["y"], fake_impl=fake)


_OfVLLM: Any = object  # for vLLM's class, the next parent, which has the other attributes


class _SlotsOfCores(_OfVLLM):
    """Slots of R: the first parent of a subclass of a vLLM LoRA linear."""

    slots: Any  # `lorasb.vllm.plugin.CoreSlots`; None in a layer that the basis does not have

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Allocate nothing yet: the manager gives the layer its basis once it knows the layer's name."""
        self.lora_config, self.count, self.slots = lora_config, max_loras, None
        self._enable_aux_cuda_stream = False
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)
        context = _vllm("config").get_current_vllm_config().compilation_config.static_forward_context
        self.name = f"{self.base_layer.prefix}.{len(context)}.lorasb"  # some models give no prefix
        context[self.name] = self
        # only shapes, from which the warm-up's adapters are made
        r, empty = lora_config.max_lora_rank, {"dtype": lora_config.lora_dtype, "device": "meta"}
        self.lora_a_stacked = tuple(torch.empty(1, 1, r, self.input_size, **empty) for _ in self.output_slices)
        self.lora_b_stacked = tuple(torch.empty(1, 1, size, r, **empty) for size in self.output_slices)

    def set_basis(self, pairs: Sequence[tuple[Tensor, Tensor] | None], make_slots: Callable[..., Any]) -> None:
        """Make the slots on this rank's shares of A and B, one pair for each part of the layer."""
        a, b = [pair and pair[0] for pair in pairs], [pair and pair[1] for pair in pairs]
        if self.tp_size > 1 and self.n_slices == 1:  # vLLM's layers with one part take a tensor, others a list
            a, b = [self.slice_lora_a(a[0])], [self.slice_lora_b(b[0])]
        elif self.tp_size > 1:
            a, b = self.slice_lora_a(a), self.slice_lora_b(b)
        shares = [None if left is None else (left, right) for left, right in zip(a, b, strict=True)]
        dtype = self.lora_config.lora_dtype
        self.slots = make_slots(shares, self.output_slices, self.input_size, self.count, dtype, self.device)
        # as buffers, which survive vLLM's sleep at level 2; R's are read again
        for name, tensor in self.slots.shared().items():
            self.register_buffer(f"lorasb_{name}", tensor, persistent=False)

    def reset_lora(self, index: int) -> None:
        """R = 0."""
        if self.slots is not None:
            self.slots.clear(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Write an adapter's R, passed in place of its A; the warm-up's adapters have A and B, and are written as 0."""
        cores, others = (one if isinstance(one, list) else [one] for one in (lora_a, lora_b))
        if lora_a is _IN_SLOT:
            raise RuntimeError("an adapter that left its slot has to be loaded again")
        if any(one is not None and one.numel() for one in others):
            self.reset_lora(index)
        else:
            self.slots.write(index, cores)

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        flat, rows = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            torch.ops.vllm.lorasb_add(flat, rows, self.name)
        else:
            self.add(flat, rows)
        return output

    def add(self, y: Tensor, x: Tensor) -> None:
        """y += B R A x of every token that has an adapter, in place."""
        wrapper = self.punica_wrapper
        # on a CPU, vLLM sets `no_lora` if no token has one; a captured graph must not depend on it: it reads indices
        if self.slots is not None and not wrapper.no_lora:
            self.slots.add_to(y, x, wrapper._token_lora_indices[: len(x)])


_IN_SLOT = object()  # replaces an adapter's R that only a slot holds
_LEFT = SimpleNamespace(lora_a=_IN_SLOT, lora_b=_IN_SLOT)


class _Manager(_OfVLLM):
    """The first parent of a subclass of vLLM's manager of a worker's adapters."""

    lorasb_parts: Parts

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        """Wrap the layers that the basis has, and give each its A and B."""
        basis = self.lorasb_parts.read_basis()
        self.lorasb_parts.check_base(basis, Path(vllm_config.model_config.model))
        config = self.lora_config
        if config.fully_sharded_loras:
            raise ValueError("expected fully_sharded_loras off: A and B are shared by all adapters, and small")
        self.places = _places(model, basis.factors)
        factors = {self.places[name]: pair for name, pair in basis.factors.items()}
        if config.target_modules is None:  # no slots for embeddings and the head
            config.target_modules = sorted({name.rpartition(".")[2] for name in factors})
        adapted = super().create_lora_manager(model, vllm_config)
        manager, covered = self._adapter_manager, set()
        for name, module in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            if not isinstance(module, _SlotsOfCores) or not any(part in factors for part in parts):
                continue
            if len(parts) != module.n_slices:
                raise ValueError(f"{name} is made of {len(parts)} layers in {module.n_slices} parts: {_AS_LORA}")
            module.set_basis([factors.get(part) for part in parts], self.lorasb_parts.make_slots)
            covered |= set(parts)
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper._token_lora_indices.fill_(-1)  # a captured graph reads past the tokens of a step
        missing_layer = _vllm("model_executor.models.utils").PPMissingLayer  # of other pipeline stages
        elsewhere = tuple(f"{name}." for name, one in adapted.named_modules() if isinstance(one, missing_layer))
        lacking = sorted(name for name in set(factors) - covered if not f"{name}.".startswith(elsewhere))
        if lacking:
            raise ValueError(
                f"{basis.folder} adapts {len(lacking)} layers that this model does not have as linears with LoRA: "
                f"{', '.join(lacking[:3])}. Serve the model that it was made on, or {_AS_LORA}"
            )
        # names and ranks are all that is read from here on
        meta = {name: (a.to("meta"), b.to("meta")) for name, (a, b) in basis.factors.items()}
        self.basis = basis._replace(factors=meta)
        return adapted

    def _load_adapter(self, lora_request: Any) -> Any:
        folder = Path(_vllm("lora.utils").get_adapter_absolute_path(lora_request.lora_path))
        if not folder.is_dir():
            raise _vllm("exceptions").LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
        dtype = self.lora_config.lora_dtype
        weights, loras = _vllm("lora.lora_weights").LoRALayerWeights, {}
        nothing = torch.empty(0, dtype=dtype)  # rather than None: vLLM pins its memory
        for name, core in self.lorasb_parts.read_cores(folder, self.basis, dtype).items():
            place, r = self.places[name], core.shape[0]
            loras[place] = weights(place, r, r, core, nothing, scaling=1)
        rank = max(len(a) for a, _ in self.basis.factors.values())
        loaded = _vllm("lora.lora_model").LoRAModel(lora_request.lora_int_id, rank, loras)
        loaded.has_cores = True  # unlike those of the warm-up, which share their weights
        return loaded

    def add_adapter(self, lora_request: Any) -> bool:
        """Load an adapter if it is missing. If every loaded adapter has a slot, drop the second copy."""
        loaded: bool = super().add_adapter(lora_request)
        manager = self._adapter_manager
        adapter = manager.get_adapter(lora_request.lora_int_id)
        if manager.capacity == manager.lora_slots and hasattr(adapter, "has_cores"):
            adapter.loras = dict.fromkeys(adapter.loras, _LEFT)
        return loaded

    def _apply_adapters(self, lora_requests: Any) -> None:
        """Load the adapters that a step needs. vLLM's own method rereads those with `load_inplace` in each step."""
        manager, wanted = self._adapter_manager, {one.lora_int_id: one for one in lora_requests if one}
        if len(wanted) > manager.lora_slots:
            raise RuntimeError(
                f"expected at most {manager.lora_slots} adapters in a batch (--max-loras), got {len(wanted)}"
            )
        active, registered = manager._active_adapters, manager._registered_adapters
        resident = [key for key in wanted if key in active and key in registered]
        for key in resident:  # first, so that none of them is evicted for another
            registered.touch(key)
            active.touch(key)
        for key in wanted.keys() - set(resident):
            self.add_adapter(wanted[key])


def lora_request(name: str, path: str) -> Any:
    """A request for an adapter of an `LLM` in this process, whose R's replace those of the same name."""
    number = zlib.crc32(name.encode()) % (1 << 30) + 1  # always the same for a name: vLLM identifies adapters by it
    return _vllm("lora.request").LoRARequest(name, number, path, load_inplace=True)


def complete(
    llm: Any, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], request: Any
) -> list[tuple[list[int], list[float]]]:
    """Return tokens and log-probabilities of one completion per prompt."""
    parameters = importlib.import_module("vllm").SamplingParams(**sampling, logprobs=0)
    tokens = [{"prompt_token_ids": list(one)} for one in prompts]
    found = llm.generate(tokens, parameters, lora_request=request, use_tqdm=False)
    outputs = [one.outputs[0] for one in found]
    return [
        (list(one.token_ids), [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)])
        for one in outputs
    ]


def _places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Map names of layers in Hugging Face's model to those in vLLM's."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {name: name for name in names}
    renaming, end = mapper.get_rename_mapper(), ".lora_A.weight"  # the rules apply to names of weights
    return {name: (renaming._map_name(name + end) or name).removesuffix(end) for name in names}


def _vllm(module: str) -> Any:
    return importlib.import_module(f"vllm.{module}")
