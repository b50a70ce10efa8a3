"""LoRA-RITE (Yen et al., arXiv 2410.20265): an adaptive step that depends on the product A B alone.

The update is LoRA's. The work is done by `lorajax.optim.lora_rite` (Algorithm 1): gradients against the orthonormal
basis of the other factor, an r x r second moment that turns with the basis, and the first moment likewise, so that
(A, B) and (A M, M^-1 B) take the same step. Defaults are the released code's: betas (0.9, 0.999), eps 1e-6, clipping
and skipping at 1, escaped mass off (the paper's rho; `escape=True`).

Config: `configs/lora_rite.py`.
"""
