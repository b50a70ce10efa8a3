"""ReLoRA (Lialin et al., arXiv 2307.05695): a high-rank update from a sequence of low-rank ones.

The update is LoRA's between restarts. The work is done by `lorajax.control.relora`: every so many steps s A B is added
to a float32 sum that belongs to the run (the base itself never changes), A and B start anew, and most of their moments
in the optimizer are zeroed, by magnitude (the default here) or at random, both as in the released code; and by
`lorajax.optim.restart_schedule`, a cosine with a short climb from 0 after each restart. The released code's options
`keep_original_weights` and the trainable scale, which leave A and B without gradient, are not here.

Config: `configs/relora.py`.
"""
