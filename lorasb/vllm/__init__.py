"""A plugin for vLLM: LoRA slots hold only R, and share one A and B. Imports torch and safetensors, not PEFT."""
