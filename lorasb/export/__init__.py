"""Export of adapters as a plain LoRA: for PEFT and vLLM, for llama.cpp, or step by step for reinforcement learning."""

from .lora import adapter_delta as adapter_delta
from .lora import export_lora as export_lora
from .lora import lora_of as lora_of
