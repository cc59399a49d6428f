"""Parts of a training loop: the initializing callback, learning-rate trials, starts on rewards, the vLLM sampler."""
