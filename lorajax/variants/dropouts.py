"""The dropouts of an adapter: options of every variant, in training only.

- `dropout`: elements of the input on the adapter's branch, per token (LoRA, arXiv 2106.09685).
- `rank_dropout`: rank components, for all tokens of a step; the kept ones are scaled up (LyCORIS; there the scaling is
  an option).
- `unit_dropout`: rows of A and columns of B, for all tokens of a step; the kept ones are scaled up (LoRA Dropout, arXiv
  2404.09610, from memory of the paper; its ensemble at test time is the mean over several keys of ``bind(key=...)``).
- `module_dropout`: the whole adapter of a matrix, without scaling (LyCORIS).

The work is done by `lorajax.core.dropping`; the last three are drawn once per matrix and step. Inside DoRA they are
options of DoRA itself: the norm is that of the whole update.

Config: `configs/lora_dropout.py`.
"""
