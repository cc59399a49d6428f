"""Export of adapters as a plain LoRA: for PEFT and vLLM, for llama.cpp, or step by step for reinforcement learning."""
