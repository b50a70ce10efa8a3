"""NEFTune (Jain et al., arXiv 2310.05914): noise on the input embeddings in training, a regulariser for any variant.

Each real token's embedding is moved by a uniform draw from (-1, 1) times ``alpha / sqrt(L D)``, with L the number of
real tokens of its sequence (the released code; many ports take the padded length) and D the width. alpha: 5, 10 or 15.
No adapter is involved: the work is done by `experiments.neftune.noisy`, around the model's `apply`. A config sets
`c.neftune` to alpha; 0 is off.

Config: `configs/neftune.py`.
"""
