"""LoRA-Pro (Wang et al., arXiv 2407.18242): the step of A and B follows the full gradient as closely as rank r can.

The update is LoRA's. The work is done by `lorajax.optim.lora_pro`: the gradients of A and B are adjusted so that
``s (g_A B + A g_B)`` is the full gradient projected on the tangent space of A B (Theorem 2.1), the free matrix X solves
a Sylvester equation (Theorem 2.2), and Adam's moments are those of this full-size gradient (`moments="full"`, the
paper's; it costs the memory of full fine-tuning) or of the adjusted gradients of A and B (`moments="factors"`).

Config: `configs/lora_pro.py`.
"""
