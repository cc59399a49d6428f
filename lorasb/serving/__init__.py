"""Several adapters on one basis: the bank, an adapter per row of a batch, joint bases, and training them together."""

import peft as peft  # first: it registers the tuner, which imports the modules of this package
