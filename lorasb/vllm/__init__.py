"""A plugin for vLLM: its LoRA slots hold R alone, beside one A and B. Imports torch and safetensors, and not PEFT."""
