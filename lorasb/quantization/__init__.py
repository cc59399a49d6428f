"""Storage formats: what bitsandbytes' and our own 4- and 8-bit layers hold, and the quantizer that writes it.

Imports no bitsandbytes; uses utils alone.
"""
