r"""The fair comparison: 15 methods x 8 learning rates x 5 seeds on SST-2, MRPC, RTE, CoLA and STS-B, 3000 runs.

    python -m experiments.sweep --config configs/studies/fair_glue.py --dry-run
    python -m experiments.sweep --config configs/studies/fair_glue.py
    python -m experiments.sweep --config configs/studies/fair_glue.py:task=rte
    python -m experiments.sweep --config configs/studies/fair_glue.py:smoke
    python -m lorajax.report runs/fair_glue --reference=lora --plots=plots --into=README.md --section=fair

Methods tie once each is trained at its own learning rate (arXiv 2602.04998), while published tables compare one seed at
one rate. So every method gets eight rates, half a decade apart from 1e-5 to 3e-2 (VeRA and the head, whose best is
higher, from 1e-4 to 3e-1); the table takes the rate that is best on some seeds and scores it on the others
(`lorajax.report`). What is no part of a method is the same for
all (`recipe=fair` in configs/base.py): 600 steps of 16 examples, linear warm-up and decay, no dropout, no decay of
weights, the head at a rate of its own (1e-3; in `head`, at the rate that is swept), one evaluation, at the end, so that
no step is chosen on the split that is reported. 600 steps see 9600 examples: of SST-2's 67,349 a random 9600 that
depend on the seed, of the other tasks 1.1 (CoLA), 1.7 (STS-B), 2.6 (MRPC) and 3.9 (RTE) epochs. Texts are cut at 48
tokens in SST-2 and CoLA (2 % of SST-2's validation sentences are longer), at 64 in STS-B (3 % of the pairs) and at 96
in MRPC (one pair in a thousand) and RTE (21 %). Computed in bfloat16 on an accelerator;
adapters, optimizer and sums in float32.

All linear layers of MiniLM. Trained parameters, with the head's 770 (STS-B: 385): LoRA, rsLoRA, LoRA+, DyLoRA, PiSSA,
OLoRA, MiLoRA at rank 8 and LoHa at rank 4 332,546; LoRA-FA at rank 16 as many, beside the A that it leaves as it is;
SoRA 332,834; DoRA 353,282; AdaLoRA 498,866, of which pruning leaves an average rank of 8; VeRA at rank 256 30,722; full
fine-tuning 22,566,146. A method's own settings are those of its config: alpha and scale, LoRA+'s ratio (for B alone,
as the paper says: the released groups have the head's bias learn 16 times as fast too), AdaLoRA's schedule, SoRA's
threshold and clipping.

Each method's 40 runs of a task are one pack, and SST-2 and CoLA share its programs, as MRPC and RTE do: 75 packs, 47
compilations of a training step (AdaLoRA five), which go on in the background. With `--minutes=9` the command ends in
time for a machine that is lent for ten, and the same command goes on; `--adapters=false` leaves the numbers alone
(else full fine-tuning leaves 200 adapters of 90 MB).

Measured (NVIDIA H200, JAX 0.11.2, 2026-11-22): 3,000 of 3,000 runs; their packs trained and were evaluated for 1,442 s
in all, starting and compiling the first of each call not included, part of it beside PEFT's runs on the same GPU.
Scores in README.
"""

from typing import Any

from ml_collections import ConfigDict

from lorajax import config
from lorajax.sweep import chain, each, fixed, product

METHODS: tuple[dict[str, Any], ...] = (
    {"config": "lora"},
    {"config": "lora", "variant.rslora": True},
    {"config": "lora_plus", "optimizer.grouping": "paper"},
    {"config": "lora_fa", "arg.rank": 16},
    {"config": "dora", "variant.dropout": 0.0},
    {"config": "adalora"},
    {"config": "dylora"},
    {"config": "sora"},
    {"config": "vera"},
    {"config": "pissa"},
    {"config": "olora"},
    {"config": "milora", "variant.dropout": 0.0},
    {"config": "loha", "arg.rank": 4, "variant.alpha": 4.0},
    {"config": "full"},
    {"config": "head"},
)
RATES: tuple[float, ...] = (1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-1)
HIGHER = ("vera", "head")  # at the first eight rates their best was the eighth
TASKS = ("sst2", "cola", "stsb", "mrpc", "rte")


def get_config(arg: str | None = None) -> ConfigDict:
    args = config.arguments(arg, task="all", model="minilm", smoke=False)
    tasks = TASKS if args.task == "all" else (args.task,)
    methods, low, high, seeds = METHODS, RATES[:8], RATES[2:], range(5)
    if args.smoke:  # two programs
        tasks, methods, seeds = tasks[:1], (METHODS[0], METHODS[-1]), range(2)
        low = high = RATES[4:6]
    where = fixed(**{"study": "fair_glue", "arg.recipe": "fair", "arg.model": args.model, "arg.smoke": args.smoke})
    c = ConfigDict({"args": args})
    tuned = [product([dict(one)], each("lr", high if one["config"] in HIGHER else low)) for one in methods]
    c.trials = product(where, each("arg.task", tasks), chain(*tuned), each("seed", seeds))
    return c
