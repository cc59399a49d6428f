"""Gradients of the targets, summed over the samples: block by block, or in passes over the whole model.

`plan` chooses and refuses, `executor` carries out, `layerwise` (with `block_recorder`) and `whole_model` take the
gradients, `accumulator` sums them.
"""
