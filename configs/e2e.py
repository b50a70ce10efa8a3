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
Measured after one epoch of the five (`--config.epochs=1`, with `--config.scan_layers=true --config.shapes=1
--config.steps_per_call=2 --config.generate_batch=64 --config.eval_batch=128`; one H200, shared by ten runs for the
first two thirds, stopped and resumed; JAX 0.11.2, bfloat16, 2026-11-22, seed 0), in percent over all of the test set:
LoRA BLEU 65.0, chrF 69.7, ROUGE-L 66.0 (untrained 3.6, 29.2, 22.0); full fine-tuning, `:variant=full`, 66.7, 71.1,
68.1. Perplexity of held-out texts 3.79 and 3.34 (untrained 19.1). Forgetting, the loss on dolly: 2.81 before, 3.39
after LoRA, 3.09 after full fine-tuning, so here the adapter forgets more.
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
