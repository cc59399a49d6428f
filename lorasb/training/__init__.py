"""Parts of a training loop: the callback that initializes, trials of rates, starts on rewards, the sampler in vLLM."""
