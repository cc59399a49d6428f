"""Storage formats of 4- and 8-bit layers, and the quantizer that writes them; never imports bitsandbytes."""
