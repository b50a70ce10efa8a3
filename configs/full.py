r"""Full fine-tuning, the yardstick, on a GLUE task or on `reviews`, which needs no model hub.

    python -m experiments.glue --config configs/full.py
    python -m experiments.glue --config configs/full.py:smoke
    python -m experiments.glue --config configs/full.py:task=rte,model=minilm --config.lr=3e-5 --config.seed=1

Every leaf is trained (`targets=all`); `targets=all-linear` or another preset trains those weights and the head.

Measured (reviews, minilm, seed 0; 2 cores of an AMD EPYC, JAX 0.10.2, 2026-11-22): accuracy 0.859 after 596 steps;
majority class 0.487, head on the frozen encoder 0.770. 596 CPU seconds for the whole command, compilation included
(9 minutes of wall clock beside other jobs on these cores).
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
    c = ConfigDict()
    c.args = args
    c.study = "glue"
    c.seed = 0
    # Data. data: folder of parquet files in the hub's layout, '' for LORAJAX_DATA or the hub. examples: of each split,
    # 0 for all. shapes: how many padded lengths, that is how many programs are compiled.
    c.data = ""
    c.examples = 0
    c.max_length = length
    c.batch = 32
    c.eval_batch = 128
    c.shapes = 4
    # Model. dropout: of the encoder, -1 for the checkpoint's own. compute_dtype: auto is bfloat16 on an accelerator and
    # float32 on a CPU.
    c.pooling = "mean"
    c.dropout = 0.0 if args.task == "reviews" else 0.1
    c.head_dropout = 0.0
    c.compute_dtype = "auto"
    c.scan_layers = False
    c.remat = "none"
    # Optimizer: AdamW. warmup: a fraction of the run. The new head takes a larger learning rate than the encoder.
    c.lr = lr
    c.head_lr = 1e-3
    c.epochs = float(epochs)
    c.warmup = 0.06
    c.schedule = "linear"
    c.weight_decay = 0.01
    c.lora_plus = 1.0
    c.clip = 1.0
    c.accumulate = 1
    c.label_smoothing = 0.0
    # Method.
    c.variant = {"name": "full"}
    c.controller = {"name": "identity"}
    # Loop. eval_every and save_every: steps; 0 is once an epoch. steps_per_call: optimizer steps in one jitted call.
    c.eval_every = 0
    c.save_every = 0
    c.log_every = 10
    c.steps_per_call = 1
    c.probe = True
    if args.smoke:
        c.update(examples=128, max_length=16, shapes=1, batch=16, eval_batch=64, epochs=1.0, log_every=1)
    return c
