"""LoRA-FA (Zhang et al., arXiv 2308.03303): A stays at its random start, only B is trained.

The update is LoRA's with its A without gradient, ``LoRA(freeze_a=True)``: the backward pass then keeps x A, rank
numbers per token, in place of x. The work is done by `lorajax.optim.lora_fa`, which gives A neither update nor
optimizer state (the paper's first version, the default) or `lorajax.optim.lora_fa_projected` (PEFT's optimizer): AdamW
on ``g_B <- (A^T A + 1e-8 I)^-1 g_B / s^2``, the gradient of B whose step explains the full gradient best. The latter
wants a learning rate of its own. rank * out numbers are trained per matrix; A is saved with them.

Config: `configs/lora_fa.py`.
"""
