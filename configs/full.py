r"""Full fine-tuning, the yardstick, on a GLUE task or on `reviews`, which needs no model hub.

    python -m experiments.glue --config configs/full.py
    python -m experiments.glue --config configs/full.py:smoke
    python -m experiments.glue --config configs/full.py:task=rte,model=minilm --config.lr=3e-5 --config.seed=1

Every leaf is trained (`targets=all`); `targets=all-linear` or another preset trains the weights of those sites and the head.

Measured (reviews, minilm, seed 0): pending
"""

from ml_collections import ConfigDict

from lorajax import config

# task: (epochs, lr, max length), in the usual ranges for BERT-sized encoders: 3 to 10 epochs, batch 32.
TASKS = {
    "mnli": (3, 5e-5, 128),
    "sst2": (3, 5e-5, 128),
    "mrpc": (5, 5e-5, 128),
    "cola": (10, 5e-5, 64),
    "qnli": (3, 5e-5, 256),
    "qqp": (3, 5e-5, 128),
    "rte": (10, 5e-5, 256),
    "stsb": (10, 5e-5, 128),
    "wnli": (10, 5e-5, 256),
    "reviews": (2, 5e-5, 64),
}


def get_config(arg: str | None = None) -> ConfigDict:
    args = config.arguments(arg, task="reviews", model="minilm", targets="all", smoke=False)
    epochs, lr, length = config.choose("task", args.task, TASKS)
    c = ConfigDict(dict(
        args=args,
        study="glue",
        seed=0,
        # Data. data: folder of parquet files in the hub's layout, '' for LORAJAX_DATA or the hub. examples: 0 is all.
        data="",
        examples=0,
        max_length=length,
        batch=32,
        eval_batch=128,
        # Model. compute_dtype: auto is bfloat16 on an accelerator and float32 on a CPU.
        pooling="mean",
        head_dropout=0.0,
        compute_dtype="auto",
        scan_layers=False,
        remat=False,
        # Optimizer: AdamW. warmup: a fraction of the run. The new head takes a larger learning rate than the encoder.
        lr=lr,
        head_lr=1e-3,
        epochs=float(epochs),
        warmup=0.06,
        schedule="linear",
        weight_decay=0.01,
        lora_plus=1.0,
        clip=1.0,
        accumulate=1,
        label_smoothing=0.0,
        # Method.
        variant=dict(name="Full"),
        controller=dict(name="identity"),
        # Loop. eval_every and save_every: steps; 0 is once an epoch.
        eval_every=0,
        save_every=0,
        log_every=10,
        steps_per_call=1,
        probe=True,
    ))  # fmt: skip
    if args.smoke:
        c.update(dict(examples=128, max_length=16, batch=16, eval_batch=64, epochs=1.0, log_every=1))
    return c
