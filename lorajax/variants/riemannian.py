"""Riemannian preconditioned LoRA, scaled AdamW (Zhang and Pilanci, arXiv 2402.02347, section 3).

The update is LoRA's. The work is done by `lorajax.optim.riemannian`: the gradients of A and B are multiplied by
``(B B^T + delta I)^-1`` and ``(A^T A + delta I)^-1`` before AdamW, which makes the step independent of how large A is
relative to B. delta is 1e-6 (authors' code; PEFT 1e-2). Both gradients are scaled by the factors before the step, as in
the paper; `order="released"` scales that of B by the A after it, as the authors' AdamW does.

Config: `configs/riemannian.py`.
"""
