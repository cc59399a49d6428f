"""4-bit bases on a CPU against bitsandbytes: speed, loss, and the documentation's table."""
