"""Names used in files and models, and limits, shared by all packages. Importing this module imports nothing."""

VERSION = "0.3.0"  # of the package, and in every saved adapter
DOCS = "https://github.com/lorasb/lorasb/tree/main/docs"  # as in pyproject.toml; a wheel has no docs/

DEFAULT_RANK = 64
MAX_RANK = 256  # largest r that the kernels support

PEFT_NAME = "LORASB"  # the method's name in PEFT's registry, and `peft_type` in adapter_config.json
PEFT_PREFIX = "base_model.model."  # precedes the base model's names in a PeftModel and in its state dicts
BASE_ROW = "__base__"  # PEFT's name for "no adapter" in `adapter_names`
IGNORED = -100  # transformers' label for tokens without a loss

UPDATES = ("adamw", "sgd", "per-sample")  # first steps that init="update" can simulate
FACTORS = ("lorasb_A", "lorasb_R", "lorasb_B")  # attributes of a layer: A [r, in], R [r, r], B [out, r]
FROZEN_FACTORS = ("lorasb_A", "lorasb_B")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FACTORS_NAME = "lorasb_factors.safetensors"  # A and B of a run's checkpoints, next to WEIGHTS_NAME
