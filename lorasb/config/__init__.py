"""`LoRASBConfig` and PEFT's names for the method.

PEFT is imported here, before any module of the package: it registers the tuner, which imports these modules.
"""

import peft as peft
