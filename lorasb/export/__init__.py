"""An adapter for others: as a plain LoRA of PEFT (`lora`), or for llama.cpp (`gguf`). Uses checkpoints and tuner."""

from .lora import export_lora as export_lora
