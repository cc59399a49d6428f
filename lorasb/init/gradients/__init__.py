"""ΣG of the targets over the samples: block by block, or in passes over the whole model.

`plan` chooses a strategy by the estimates of `cost_model`, `executor` runs it, `layerwise` (with `block_recorder`) and
`whole_model` are the strategies, `accumulator` sums the gradients in hooks.
"""
