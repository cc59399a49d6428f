"""A plugin for vLLM: its LoRA slots hold R alone, and all share one A and B. Imports torch and safetensors, not PEFT."""
