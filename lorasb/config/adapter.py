"""`LoRASBConfig`, saved next to the weights as adapter_config.json, in PEFT's layout."""

from __future__ import annotations

import copy
import inspect
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from ..checkpoints.adapter_file import scaling_of
from ..checkpoints.model_card import update_card
from ..compat import peft as private
from ..constants import CONFIG_NAME, DEFAULT_RANK, MAX_RANK, PEFT_NAME, WEIGHTS_NAME
from ..utils.atomic_files import set_usual_mode, write_json
from ..utils.checks import MAX_REPEATS, check_pattern, matches
from ..utils.reading import safetensors_header

INITS = ("update", "lora-xs", "lora-xs-output", "kaiming", "random")
ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lorasb_only", "lora_only")  # the last is PEFT's name for the third: its configs carry over
STARTS = ("zero", "same")  # values of R at the start, for an adapter on another one's basis
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6  # of s and alpha: beyond them, products with R leave the 16-bit range
EMBEDDINGS = (".embed_tokens.weight", ".lm_head.weight")  # keys that PEFT adds by itself
NOT_SAVED = ("init_seed", "check_base", "group")  # of no use to whoever loads the adapter
# Fields that patching overwrites with values resolved for one model; `start_over` resets them.
RESET = ("r", "rank_pattern", "target_modules", "modules_to_save", "task_type", "base_fingerprint", "init_provenance")


class WrittenHere(dict[str, Any]):
    """A field that patching or an initialization wrote in this process: copies of its config request a new adapter."""


# `__post_init__` looks up PeftType(PEFT_NAME), even if the config is imported before the method is registered.
private.extend_peft_types(PEFT_NAME)


@dataclass
class AdapterOptions:
    """Options of an adapter, the same in all of its layers. To add an option, add a field here and in `LoRASBConfig`.

    `layer.adapters[name]` then has it. If it belongs to the factors that adapters share or swap, list it in `COPIED`
    (serving/basis.py) or `DESCRIBING` (tuner/loading.py).
    """

    lora_dropout: float = 0.0  # probability of dropping an element of x on the adapter's path
    equivalent_gradient: bool = False  # whether Theorem 3's closed form is applied to R's gradient
    wide_factors: bool = False  # whether A and B are in fp32 over a base in 16 bits

    def options(self: object) -> dict[str, Any]:  # of a configuration, too
        """The fields above, by name."""
        return {one.name: getattr(self, one.name) for one in fields(AdapterOptions)}


@dataclass
class LoRASBConfig(PeftConfig):
    """Configuration of LoRA-SB: `W = W0 + s·B·R·A`, with A [r, in], B [out, r] frozen and R [r, r] trained.

    Args:
        r: rank, at most 256. `None` means 64, capped at a smaller layer's min(in_features, out_features); an explicit
            rank above that is an error that names the layer.
        target_modules: names (matched by suffix) of linears, embeddings, convolutions or attention; a regex; or
            "all-linear", which leaves out output embeddings, and modules missing from the base's checkpoint (heads,
            poolers), which are trained in full.
        target_parameters: names (matched by suffix) of parameters, such as experts' 3-D weights: every matrix in one
            gets its own A, R and B. Experts that compute like Mixtral's and Qwen3-MoE's are opened into linears;
            others compute with the sum W + s·B·R·A.
        exclude_modules: names or a regex of modules to leave alone.
        layers_to_transform: indices of the blocks to adapt; `layers_pattern` names the list they index.
        rank_pattern: name or regex -> rank, for layers that differ from `r`.
        lora_dropout: probability of dropping an element of the adapter's input.
        basis: name of an adapter of the model whose A, B, layers, ranks and s this one shares. Only R is trained and
            saved, with the digest of A and B.
        basis_start: initial R of an adapter on a basis: "zero", or "same" for a copy of the basis's R.
        bias: biases of the base that are trained and saved too: "none", "all" or "lorasb_only" (or "lora_only"),
            those of the adapted layers. With trained biases a disabled adapter is not the base model.
        scaling: s. Needs no tuning: LoRA-SB's equivalent gradient does not depend on s (Theorem 5).
        init: "update" (LoRA-SB, Eq. 6-8), "lora-xs" (SVD of W, Σ in A as its authors do), "lora-xs-output" (Σ in
            B), "kaiming" (SVD of a random matrix, Table 5) or "random" (orthonormal A and B, R = 0: the control). All
            but the first need no data: the adapter is initialized when the model is patched.
        init_seed: seed of a data-free init when a model is patched; not used by `lorasb.initialize(model, seed=...)`.
        lora_alpha: only for init="lora-xs" and "lora-xs-output", whose scaling is alpha/r. Defaults to r for language
            models and to 16 for classification.
        equivalent_gradient: replace R's gradient by Theorem 3's closed form. Needed only where the factors are not
            orthonormal; with LoRA-SB's own factors it only cancels s.
        wide_factors: keep A and B in fp32 over a base in 16 bits, and compute the adapter in fp32, as PEFT's LoRA
            does; this takes more memory and time.
        modules_to_save: modules that are trained and saved in full. Modules that are missing from the base's
            checkpoint, such as a classification head, are added automatically.
        trainable_token_indices: rows of the input embedding that are trained with the adapter, or embedding name ->
            rows, as in PEFT's LoraConfig.
        ensure_weight_tying: let a head tied to the input embedding follow the embedding's training through
            `modules_to_save` or `trainable_token_indices`, as in PEFT's LoraConfig.
        init_provenance: written by `lorasb.initialize`: data, seed, learning rate, samples, versions.
        layer_kinds: written when a model is patched: kind and shape of adapted parameters other than a linear's weight.
        base_fingerprint: written when a model is patched: sampled weights that identify the base model.
        check_base: compare the base model with a loaded adapter's fingerprint, and write one when a model is patched.
            `PeftModel.from_pretrained(base, folder, check_base=False)` loads an adapter on another base.
        group: compute linears that read the same input (q, k and v; gate and up) in one call. None: on machines with a
            GPU, where it halves the host time per layer; on CPUs it gained nothing. One adapter's False turns it off.

    Raises:
        ValueError: a field has a value that no model can use; the message says which are allowed.
    """

    r: int | None = field(default=None, metadata={"help": "Rank; None: 64, capped at smaller layers."})
    target_modules: list[str] | set[str] | str | None = field(default=ALL_LINEAR)
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lora_dropout: float = 0.0
    basis: str | None = None
    basis_start: str = "zero"
    bias: str = "none"
    scaling: float = 1.0
    init: str = "update"
    init_seed: int = 0
    lora_alpha: float | None = None
    equivalent_gradient: bool = False
    wide_factors: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_provenance: dict[str, Any] | None = None
    layer_kinds: dict[str, list[Any]] | None = None
    base_fingerprint: dict[str, str] | None = None
    check_base: bool = True
    group: bool | None = None

    options = AdapterOptions.options

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights_follow = False
        self.start_at: str | None = None  # the adapter whose R is copied to start one on a basis
        self.saved_names: tuple[str, ...] | None = None  # of the tensors in the file next to this config
        self.source: tuple[str, dict[str, Any]] | None = None  # the folder or hub name it was read from, and options
        self.peft_type = PeftType(PEFT_NAME)
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, str):
                check_pattern(names, name)
            elif isinstance(names, list):  # sets, as in PEFT's LoraConfig; JSON has none
                setattr(self, name, set(names))
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters must be a list, got {self.target_parameters!r}: put it into [...]")
        self.target_parameters = sorted(self.target_parameters) if self.target_parameters else None
        self.rank_pattern = dict(self.rank_pattern or {})
        self._check_ranks()
        self._check_values()
        for name in ("rank_pattern", "modules_to_save", "layers_pattern"):
            values = getattr(self, name) or ()
            for value in [values] if isinstance(values, str) else values:
                check_pattern(value, name, MAX_REPEATS - 1)  # matched after an arbitrary prefix

    def _check_ranks(self) -> None:
        ranks = [("r", self.r)] if self.r is not None else []
        ranks += [(f"rank_pattern[{key!r}]", rank) for key, rank in self.rank_pattern.items()]
        for name, rank in ranks:
            # bool is a subclass of int: r=True would pass as rank 1
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{name} must be a positive integer, got {rank!r}")
            if rank > MAX_RANK:
                raise ValueError(f"{name} must be at most {MAX_RANK}, got {rank}")

    def _check_values(self) -> None:
        for name, allowed in (("init", INITS), ("basis_start", STARTS), ("bias", BIASES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.init_seed, bool) or not isinstance(self.init_seed, int) or self.init_seed < 0:
            raise ValueError(f"init_seed must be an integer >= 0, got {self.init_seed!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}")
        if not isinstance(self.scaling, int | float) or not SMALLEST_SCALE <= abs(self.scaling) <= LARGEST_SCALE:
            raise ValueError(
                f"scaling must be finite and not zero, from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g} in size, got "
                f"{self.scaling!r}"
            )
        alpha = self.lora_alpha
        if alpha is not None and not (isinstance(alpha, int | float) and SMALLEST_SCALE <= alpha <= LARGEST_SCALE):
            raise ValueError(f"lora_alpha must lie between {SMALLEST_SCALE:g} and {LARGEST_SCALE:g}, got {alpha!r}")
        if alpha is not None and not self.init.startswith("lora-xs"):
            raise ValueError(f"lora_alpha belongs to init='lora-xs', got init={self.init!r}: use scaling=...")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list of layers_to_transform: give layers_to_transform too")
        regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if regex and self.layers_to_transform is not None:
            raise ValueError(f"layers_to_transform: select the layers in the regex {self.target_modules!r} itself")

    @property
    def from_file(self) -> bool:
        """True if the adapter exists already: its weights come from a file or from other adapters."""
        provenance = self.init_provenance
        return self._weights_follow or (provenance is not None and not isinstance(provenance, WrittenHere))

    def weights_follow(self) -> LoRASBConfig:
        """Declare that the caller writes A, R and B of the next adapter made from this config: no init runs."""
        self._weights_follow = True
        return self

    def start_over(self) -> None:
        """Restore the fields that patching another model has resolved, so that one config serves several models."""
        # Otherwise ranks capped for a small model, or its target names, would be explicit requests for the next model.
        self.__dict__.update(getattr(self, "_asked", {}))
        for name in ("init_provenance", "base_fingerprint"):
            if isinstance(getattr(self, name), WrittenHere) and not self._weights_follow:
                setattr(self, name, None)
        self._asked = {name: copy.copy(getattr(self, name)) for name in RESET}

    def scaling_for(self, r: int) -> float:
        """The scaling s of a layer of rank `r`."""
        return scaling_of(vars(self), r)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and the LoRA-SB section of the model card, each atomically."""
        if os.path.isfile(save_directory):
            raise ValueError(f"expected a folder to save into, got the file {save_directory}")
        config_dict = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        # PEFT passes the base's class for adapters without a task type; AutoPeftModel loads the base by it
        if kwargs.get("auto_mapping_dict") is not None:
            config_dict["auto_mapping"] = kwargs["auto_mapping_dict"]
        for name in NOT_SAVED:
            config_dict.pop(name)
        weights = Path(save_directory) / WEIGHTS_NAME
        if weights.is_file():
            _warn_of_embeddings(weights, self.modules_to_save or ())
            set_usual_mode(weights)
        write_json(Path(save_directory) / CONFIG_NAME, config_dict)
        update_card(Path(save_directory), config_dict, self.scaling_for(self.r or DEFAULT_RANK))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoRASBConfig:
        """Read a configuration; a ValueError if there is none, or the weights file next to it is truncated."""
        weights = Path(pretrained_model_name_or_path, subfolder or "", WEIGHTS_NAME)
        # PEFT reads the config before it patches the model, so a truncated file is refused with the model untouched
        names = tuple(safetensors_header(weights)[0]) if weights.is_file() else None
        try:
            config: LoRASBConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            if not isinstance(config, LoRASBConfig):
                raise TypeError(f"expected an adapter of type {PEFT_NAME}, got {config.peft_type}")
            hints = get_type_hints(LoRASBConfig)
            for one in fields(LoRASBConfig):
                value = getattr(config, one.name)
                if not matches(value, hints[one.name]):
                    raise TypeError(f"{one.name}: expected {one.type}, got {value!r}")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            where = f"{pretrained_model_name_or_path}: the adapter's {CONFIG_NAME}"
            raise ValueError(f"{where} cannot be used: {str(error) or type(error).__name__}") from error
        config.saved_names = names
        config.source = str(pretrained_model_name_or_path), {"subfolder": subfolder, **kwargs}
        return config.weights_follow()


def adapt_exactly(config: LoRASBConfig, ranks: Mapping[str, int]) -> None:
    """Have a configuration name these layers in full, each with its rank; no other selection filters them again."""
    config.r, config.target_modules = max(ranks.values()), set(ranks)
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _warn_of_embeddings(weights: Path, trained: Collection[str]) -> None:
    """Warn about an embedding that PEFT saved with the adapter, as it does after the vocabulary was resized."""
    names = [name for name in safetensors_header(weights)[0] if name.endswith(EMBEDDINGS)]
    found = [name for name in names if not any(name.endswith(f".{module}.weight") for module in trained)]
    if found:
        warnings.warn(
            f"{found[0]} is in the adapter file, as the vocabulary was resized or save_embedding_layers is set: it "
            "loads only on a base with the same values. Name it in modules_to_save, or rows in trainable_token_indices",
            stacklevel=4,
        )


TASK_BY_SUFFIX = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def infer_task_type(model: Any) -> str | None:
    """PEFT's task type for a transformers model; None if its class name fits none."""
    # PEFT's task-specific wrappers pass `input_ids`, so audio and vision models get the generic wrapper; two of
    # these wrappers also pass `inputs_embeds`, which CLIP passes on to encoders that have their own.
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        return None
    name, embeds = type(model).__name__, "inputs_embeds" in parameters
    for suffix, task in TASK_BY_SUFFIX.items():
        if name.endswith(suffix):
            return task if embeds or task != "QUESTION_ANS" else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and name.endswith("Generation"):
        return "SEQ_2_SEQ_LM"
    # bare encoders and decoders, BertModel or LlamaModel; other libraries' models have no config
    if name.endswith("Model") and embeds and hasattr(model, "config"):
        return "FEATURE_EXTRACTION"
    return None
