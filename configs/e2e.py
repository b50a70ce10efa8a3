r"""E2E NLG (arXiv 1706.09254) by the LoRA paper's recipe for GPT-2 (arXiv 2106.09685, section 5.4 and Table 11).

    LORAJAX_DATA=FOLDER python -m experiments.lm --config configs/e2e.py
    python -m experiments.lm --config configs/e2e.py:smoke
    LORAJAX_DATA=FOLDER python -m experiments.lm --config configs/e2e.py:model=gpt2-medium --config.scan_layers=true
    LORAJAX_DATA=FOLDER python -m experiments.lm --config configs/e2e.py:variant=full --config.seed=1

FOLDER has e2e_nlg/{train,validation,test}.parquet. `variant` is any method of configs/; the learning rate is then the
recipe's times the method's ratio to LoRA's. The paper's: query and value, r = 4, alpha = 32, dropout 0.1, AdamW at 2e-4
with linear decay behind 500 steps of warm-up, batch 8, 5 epochs, weight decay 0.01, label smoothing 0.1, no clipping;
10 beams, length penalty 0.9, no 4-gram twice. Not the paper's: the model by default, SmolLM2-135M-Instruct, which comes
from the package registry; texts that are not split by spaCy; the state with the best validation loss.

The paper has GPT-2 medium at BLEU 70.4, ROUGE-L 71.8 (of another script: `lorajax.data.text_scores`).
Not yet measured to its end. On one H200 shared by ten runs (JAX 0.11.2, bfloat16, 2026-11-22) time ended at step 3,786
of the 5,258 of one epoch (full fine-tuning: 3,350), before any evaluation; for the loss alone see configs/qlora.py,
which has run 1,000 steps of 16 pairs. A sanity check on two shared CPU cores (AMD EPYC, JAX 0.10.2, 2026-11-22, seed
0), 40 steps of 4 pairs and greedy answers to 16 meanings of the test set: perplexity of 160 held-out texts 6.1 (base
19.3); in percent BLEU 43.4 (1.0), chrF 52.8 (6.9), ROUGE-L 60.8 (5.4); loss on dolly 3.23 (2.96). By

    python -m experiments.lm --config configs/e2e.py --config.scan_layers=true --config.examples=160 --config.batch=4
      --config.warmup=5 --config.lr=1e-3 --config.epochs=1 --config.generate=16 --config.beams=1 --config.max_new=48
      --config.unrelated.examples=32 --config.unrelated.max_length=128 --config.shapes=1
"""

from ml_collections import ConfigDict

from configs.base import lm


def get_config(arg: str | None = None) -> ConfigDict:
    c = lm(
        arg, task="e2e", lr=2e-4, rank=4, targets="qv", epochs=5.0, batch=8, warmup=500.0, weight_decay=0.01,
        label_smoothing=0.1, clip=0.0, beams=10, length_penalty=0.9, no_repeat_ngram=4,
    )  # fmt: skip
    if c.optimizer.name == "adamw":
        c.optimizer.eps = 1e-6
    if c.args.variant == "lora":
        c.variant.update(alpha=32.0, dropout=0.1)
    return c
