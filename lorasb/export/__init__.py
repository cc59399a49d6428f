"""Export of adapters: as a plain LoRA for PEFT and vLLM (`lora`), or for llama.cpp (`gguf`)."""

from .lora import export_lora as export_lora
