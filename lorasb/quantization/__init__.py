"""Storage formats of 4- and 8-bit layers, bitsandbytes' and our own, and the quantizer that writes them.

Never imports bitsandbytes: its modules and states are recognized by attributes.
"""
