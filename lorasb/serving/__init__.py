"""Several adapters on one basis: the bank, an adapter per row of a batch, joint bases, and training them together.

PEFT is imported here, before any module of the package: it registers the tuner, which imports these modules.
"""

import peft as peft
