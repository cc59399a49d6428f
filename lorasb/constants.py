"""Names in files and in models, and limits that several floors share; importing this imports nothing."""

MAX_RANK = 256  # the largest r that a kernel takes

PEFT_NAME = "LORASB"  # the method in PEFT's registry and in adapter_config.json
PEFT_PREFIX = "base_model.model."  # what a PeftModel puts before the base model's names
BASE_ROW = "__base__"  # PEFT's name for no adapter, in adapter_names

FACTORS = ("lorasb_A", "lorasb_R", "lorasb_B")  # in a layer and in state dicts: A [r, in], R [r, r], B [out, r]
FROZEN_FACTORS = ("lorasb_A", "lorasb_B")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FACTORS_NAME = "lorasb_factors.safetensors"  # A and B of a run's checkpoints, beside the adapter's file
