"""Helpers without models or layers: files, sizes, plots, bit packing, precision. They import nothing else of lorasb."""
