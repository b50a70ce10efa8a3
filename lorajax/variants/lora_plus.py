"""LoRA+ (Hayou et al., arXiv 2402.12354): B learns `ratio` times as fast as A.

The update is LoRA's, ``W' = W + s A B``, with any of its options. The work is done by `lorajax.optim.lora_plus`: AdamW
with learning rate eta for A and ``ratio * eta`` for B. The paper's default is ratio 16; a good eta is about half of
plain LoRA's. Which array learns at which rate is the released code's by default (`grouping="official"`: heads' biases
and other vectors are as fast as B), the paper's as the option `grouping="paper"`.

Config: `configs/lora_plus.py`.
"""
