"""`lorasb.patch`, and `LoRASBModel`, the PEFT tuner behind it: replaces target modules, and saves, loads, merges and
registers adapters.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import peft
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from peft.utils.peft_types import PeftType, register_peft_method
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoints import adapter_file
from ..compat import extend
from ..compat import peft as private
from ..compat.bitsandbytes import keep_unpacked
from ..config.adapter import ALL_LINEAR, LoRASBConfig, WrittenHere, infer_task_type
from ..constants import PEFT_NAME, PEFT_PREFIX
from ..distributed.sharded_factors import with_kept_factors
from ..layers import linear4bit, linear_group, lookup, unfused_experts
from ..layers.adapted_layer import AdaptedLayer
from ..layers.linear import LoRASBLinear
from ..layers.weight_adapter import EmbeddingBase, adapt_weights
from ..serving import basis
from ..serving.rows import adapters_by_row
from ..utils.checks import nearest
from ..utils.precision import SIXTEEN_BIT, warn_if_slow
from . import loading, targets
from .weighted_adapter import SumOptions, combine

COPIES = ("num_beams", "num_return_sequences")  # options of `generate`: the larger one is each row's copies
InitWithoutData = Callable[[nn.Module, LoRASBConfig, str, dict[str, AdaptedLayer]], object]


def patch(
    model: nn.Module, config: LoRASBConfig | None = None, *, adapter_name: str = "default", **fields: Any
) -> peft.PeftModel:
    """Adapt a model: its target linears become `LoRASBLinear`, everything else is frozen.

    Equivalent to `peft.get_peft_model(model, LoRASBConfig(...))`, with the task type inferred from the model's class.
    The model is changed in place, and left as it was on an error. No dtype is changed; a log line states the cost of a
    16-bit dtype that this CPU cannot multiply.

    Args:
        model: a transformers model, or any module with `nn.Linear` layers.
        config: a `LoRASBConfig`, or None.
        adapter_name: name of the adapter.
        **fields: fields of `LoRASBConfig` instead of `config` (`r=96`, `target_modules=[...]`, ...).

    Returns:
        A `peft.PeftModel`. Call `lorasb.initialize(model, dataloader, lr=...)` next.

    Raises:
        TypeError: unknown fields, or both a config and fields.
        ValueError: an adapted or compiled model, no matching target, or a rank that is too large for a layer.
    """
    if isinstance(model, peft.PeftModel):
        raise ValueError("expected a model without adapters, got a peft.PeftModel: use model.add_adapter or unload it")
    # _orig_mod: the wrapper of torch.compile(model); _compiled_call_impl: model.compile(), in place
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "expected a model that is not compiled yet, or its model._orig_mod: torch.compile(lorasb.patch(model))"
        )
    if config is not None and fields:
        raise TypeError(f"expected a config or fields, got both: put {', '.join(sorted(fields))} into the config")
    if config is None:
        for name in fields.keys() - LoRASBConfig.__dataclass_fields__.keys():
            known = sorted(LoRASBConfig.__dataclass_fields__)
            hint = nearest(name, known, f"known fields: {', '.join(known)}", cutoff=0.5)
            raise TypeError(f"LoRASBConfig has no field {name!r}{hint}")
        config = LoRASBConfig(**fields)
    config = copy.deepcopy(config)  # patching resolves fields (ranks, targets) for this model alone
    if config.task_type is None:  # PEFT chooses its wrapper class (PeftModelForCausalLM, ...) by it
        config.task_type = infer_task_type(model)
    with warnings.catch_warnings():  # PEFT reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = peft.get_peft_model(model, config, adapter_name=adapter_name)
    warn_if_slow(adapted)
    return adapted


def _observe(*_: object) -> None:
    """Do nothing, as a forward hook."""


class LoRASBModel(BaseTuner):
    """The tuner behind `lorasb.patch`: replaces target linears with `LoRASBLinear`, all of them or none."""

    prefix: str = "lorasb_"
    tuner_layer_cls = AdaptedLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's declaration
    init_without_data: InitWithoutData  # set by `register`: `tuner` must not import `init`
    # shared module -> its places (owner, and the child's name in it), set by `_record_places`
    shared: dict[nn.Module, list[tuple[nn.Module, str]]] = {}  # noqa: RUF012

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check every target, then replace them all; takes the arguments of PEFT's method."""
        config = cast(LoRASBConfig, self.peft_config[adapter_name])
        # Everything below may fail halfway through the model: the block undoes what was done.
        with lookup.unchanged_on_error(model):
            targets.refuse_duplicates(model, adapter_name)
            config.start_over()  # before any field is resolved
            loading.refuse_missing_modules(model, config)
            config.base_fingerprint = config.base_fingerprint if config.check_base else None
            config.task_type = config.task_type or infer_task_type(model)
            keep_unpacked(model)  # before any forward: a repacked 4-bit weight cannot be dequantized
            targets.save_heads(model, config)
            # Experts must be nn.Linear modules before `_plan` looks for targets by name.
            known = config.from_file or kwargs.get("state_dict") is not None
            unfused_experts.open_all(model, config, by_old_names=not known)
            self._plan(model, config, kwargs.get("state_dict"))
            with self._record_places():
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = lookup.layers_with(model, adapter_name)
            config.layer_kinds = lookup.layer_kinds(layers)
            # Read W only without a merged adapter: merged values would not identify the base.
            if config.check_base and config.base_fingerprint is None and not lookup.any_merged(model):
                # Only modules that an unadapted base has, too: not an adapted attention's inner projections.
                outer = {name: layer for name, layer in layers.items() if not name.endswith(".base_layer")}
                sampled = adapter_file.fingerprint({name: layer.base.parameter() for name, layer in outer.items()})
                config.base_fingerprint = None if sampled is None else WrittenHere(sampled)
            # With a state dict (PEFT's injection by its keys), values are loaded later and would overwrite an init.
            if kwargs.get("state_dict") is None and targets.can_initialize_now(model, config, adapter_name, layers):
                # __dict__: BaseTuner.__getattr__ forwards a missing attribute to the wrapped model
                reports: dict[str, object] = self.__dict__.setdefault("init_reports", {})
                reports[adapter_name] = self.init_without_data(model, config, adapter_name, layers)
            # last: groups refer to the new layers
            linear_group.detach(model)
            if linear_group.wanted(*(cast(LoRASBConfig, one).group for one in self.peft_config.values())):
                linear_group.attach(model)
            lookup.allow_nested(model, False)

    @contextmanager
    def _record_places(self) -> Iterator[None]:
        """Fill `shared` with the places of shared modules while PEFT replaces modules one by one."""
        places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for owner in self.model.modules():  # one pass, as mixture-of-experts models have thousands of targets
            for name, child in owner._modules.items():
                if child is not None:
                    places.setdefault(child, []).append((owner, name))
        self.shared = {child: found for child, found in places.items() if len(found) > 1}
        try:
            yield
        finally:
            self.shared = {}

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """Match target_modules as PEFT does, extended to the experts of target_parameters."""
        peft_match = BaseTuner._check_target_module_exists(peft_config, key)
        names = cast(LoRASBConfig, peft_config).target_parameters
        if not names or isinstance(peft_match, private.ExcludedModule):
            return peft_match
        if unfused_experts.is_target(key, names):  # the list of a parameter's matrices, which has the parameter's name
            return False
        parameter, _, index = key.rpartition(".")  # one of its matrices: `...gate_up_proj.3`
        return peft_match or (index.isdecimal() and unfused_experts.is_target(parameter, names))

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, *args: object, **kwargs: object
    ) -> list[str]:
        """Override PEFT's wrapping of 3-D parameters: `inject_adapter` has already opened the experts into linears."""
        return unfused_experts.open_targets(model, cast(LoRASBConfig, peft_config).target_parameters or [])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: Any) -> Iterator[None]:
        """Handle `adapter_names`; PEFT enters this context around every forward and generate."""
        names, given = kwargs.get("adapter_names"), [*args, kwargs.get("generation_config")]
        configs = [one for one in given if isinstance(one, GenerationConfig)]
        configs += [self.model.generation_config] if configs else []  # fills in unset options
        copies = [kwargs.get(name) or next(filter(None, (getattr(one, name) for one in configs)), 1) for name in COPIES]
        with nullcontext() if names is None else adapters_by_row(self.model, names, max(copies)):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "auto",
        svd_rank: int | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Add the adapter `adapter_name` = Σ weights · adapters; the active adapter stays active.

        Args:
            adapters: names of initialized adapters; modules that one of them has trained in full are copied.
            weights: one per adapter, of any sign.
            adapter_name: name of the new adapter.
            combination_type, svd_rank: see `weighted_adapter.SumOptions`.
            options: as in PEFT: `density`, `majority_sign_method`, `svd_clamp`, `svd_full_matrices`, `svd_driver`.

        Returns:
            The relative error of ΔW per layer, before A and B are rounded to the base's dtype; 0 where it is exact.

        Raises:
            ValueError: unknown, uninitialized or merged adapters, a name in use, a wrong number of weights, several
                adapters with modules that were trained in full, or invalid options.
        """
        return combine(self, adapters, weights, adapter_name, SumOptions(combination_type, svd_rank, **options))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Call PEFT's method; layers with a trained bias run their base, so that the bias gets a gradient."""
        super()._mark_only_adapters_as_trainable(model)
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer):
                bias = getattr(layer.get_base_layer(), "bias", None)
                layer.base.trains_bias = bias is not None and bias.requires_grad

    def _add_modules_to_save_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        """Call LoRA's method: with `ensure_weight_tying`, modules tied to the saved input embedding follow it."""
        LoraModel._add_modules_to_save_to_tie(cast(LoraModel, self), cast(LoraConfig, peft_config), tied_weight_keys)

    def _plan(self, model: nn.Module, config: LoRASBConfig, state_dict: dict[str, Tensor] | None) -> None:
        """Resolve targets and ranks (from `state_dict` if given); raise for anything that would make replacing fail."""
        basis.resolve(model, config, self.peft_config)
        if config.target_modules is None:  # PEFT would use a table by model type, which LoRA-SB does not have
            config.target_modules = ALL_LINEAR
        # PEFT replaces "all-linear" with a set of full names, so check for it first.
        all_linear = config.target_modules == ALL_LINEAR
        private.include_all_linear(config, model)
        if all_linear:
            config.target_modules = targets.filter_all_linear(model, config)
        named_in = None if state_dict is None else targets.layers_named_in(state_dict)

        def is_target(name: str) -> bool:
            """True for a module that the configuration names."""
            if named_in is None:
                return bool(self._check_target_module_exists(config, name))
            return targets.without_wrapper(name) in named_in

        found = {
            name: module
            for name, module in model.named_modules()
            # modules inside a tuner layer (base_layer) belong to an earlier adapter; the layer itself is the target
            if name and is_target(name) and not targets.inside_tuner(model, name)
        }
        targets.check_targets(model, config, found, state_dict)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(LoRASBConfig, peft_config)
        rank = targets.rank_for(config, current_key)
        options: dict[str, Any] = {"r": rank, "scaling": config.scaling_for(rank), **config.options()}
        if isinstance(target, AdaptedLayer):  # a further adapter on a patched layer
            if config.basis and config.basis in target.lorasb_R and not config.from_file:
                scaling = target.adapters[config.basis].made_with  # as configured, ignoring `set_scale`
                options |= {"basis": config.basis, "start_at": config.start_at, "scaling": scaling}
            target.add_adapter(adapter_name, **options)
            return
        layer = adapt_weights(target, adapter_name, **options) or LoRASBLinear(
            target,
            adapter_name,
            fan_in_fan_out=isinstance(target, Conv1D),  # GPT-2's, which stores W as [in, out]
            octet_dtype=targets.float_dtype(self.model),
            resolver_options=get_quantization_kwargs(self.model),
            **options,
        )
        if isinstance(parent, nn.TransformerEncoderLayer):  # without a hook, its eval mode reads weights itself
            layer.register_forward_hook(_observe)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace the child in all of its places; PEFT's version also reads `.weight`, which a head may lack."""
        for owner, name in self.shared.get(child, ()):
            owner._modules[name] = new_module
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast R to fp32 or the base's dtype; PEFT's version makes A and B trainable fp32 copies."""
        for module in self.model.modules():
            if isinstance(module, AdaptedLayer):
                module.cast_factors(adapter_name, wide_core=autocast_adapter_dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base weights: all layers, or none if one would get values that are not finite."""
        targets.check_mergeable(self.model, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            targets.check_mergeable(self.model, kwargs.get("adapter_names"))
        linear_group.detach(self.model)  # its pre-hooks would stay on the plain model
        with self._record_places():
            model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        unfused_experts.close(model)
        lookup.allow_nested(self.model, True)
        return model

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Merge the adapters and return the plain model; quantized layers become dense.

        Args:
            progressbar, safe_merge, adapter_names: as in PEFT.
            requantize: return layers that had 4 bits to the same 4-bit format. This rounds the update too:
                `model.requantization_errors` has ‖W4 − W‖ / ‖W‖ by layer, and a log line names the worst.
        """
        # The formats must be noted before merging, which replaces the quantized layers.
        bases = linear4bit.quantized_bases(self.model) if requantize else None
        model: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if bases is not None:
            linear4bit.requantize(model, bases)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter that is not the basis of others."""
        lookup.refuse_basis_of_others(lookup.layers_with(self.model, adapter_name), adapter_name)
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layers = lookup.layers_with(model, adapter_name)
        parts = lookup.parts_of_keys(layers)
        if clash := next((name for name in unwanted_adapter_names if name in parts), None):
            raise ValueError(lookup.unsavable(clash))
        try:
            lookup.refuse_uninitialized(layers, adapter_name)
        except ValueError as error:
            warnings.warn(f"{error}, or after loading it, or save others by selected_adapters", stacklevel=3)
        for name, layer in layers.items():  # PEFT also writes an adapted embedding's weight: write it unmerged
            if isinstance(layer.base, EmbeddingBase) and layer.base.own is not None:
                merged = {key for key in state_dict if key.removeprefix(PEFT_PREFIX) == f"{name}.base_layer.weight"}
                state_dict.update(dict.fromkeys(merged, layer.base.own))
        saved_tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # R that trains in 16 bits on request is written in fp32, without loss: a loaded R has fp32 anyway
        wide = {k: v.float() if targets.CORE in k and v.dtype in SIXTEEN_BIT else v for k, v in saved_tensors.items()}
        return basis.without_factors(with_kept_factors(wide, model, adapter_name), layers, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        ours, layers = cast(LoRASBConfig, config), lookup.layers_with(model, adapter_name)
        for layer in layers.values():
            layer.refuse_merged(adapter_name)
        state_dict, move = loading.with_factors(state_dict, adapter_name, layers, ours)
        adapter_file.check_tensors(state_dict, {name: layer.shapes(adapter_name) for name, layer in layers.items()})
        state_dict = loading.without_foreign(state_dict, model, ours, adapter_name, layers)
        move()
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def register(init_without_data: InitWithoutData) -> None:
    """Register LoRA-SB with PEFT and set the function that runs data-free inits; idempotent."""
    # staticmethod: as a plain function on the class it would be bound and get the tuner as its first argument
    LoRASBModel.init_without_data = staticmethod(init_without_data)
    # register_peft_method raises for a method that is registered already
    if PeftType(PEFT_NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="lorasb", config_cls=LoRASBConfig, model_cls=LoRASBModel, prefix=LoRASBModel.prefix)
    extend(peft.PeftModel, "load_adapter", loading.by_peft)
    extend(hotswap, "hotswap_adapter", loading.swap)
    extend(PreTrainedModel, "load_adapter", loading.by_transformers)
