"""`lorasb plan`: the memory and time of a run before it starts, from a model's config alone.

`live_bytes` counts what tensors are alive, `fake_step` runs a training step of a model without memory under it, `gpus`
knows cards, and `planner` puts these together and says what to change where a run does not fit.
"""
