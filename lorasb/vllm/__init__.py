"""A plugin for vLLM, whose LoRA slots then hold R alone, on one A and B. Imports torch and safetensors, not PEFT."""
