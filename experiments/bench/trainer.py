"""SST-2 as PEFT's users train it: Hugging Face's Trainer around PEFT's LoRA. See experiments.bench.end_to_end.

    python -m experiments.bench.trainer --model FOLDER --data FOLDER --out FOLDER [--epochs 3]

LoRA on query and value and a new head, AdamW, linear schedule with warm-up, no dropout, bfloat16 on a GPU; rows padded
to the longest of their batch; an evaluation and a checkpoint after each epoch, the best one loaded at the end. The last
line is JSON: its accuracy, its steps, the seconds of `train()`. Nothing of lorajax is imported: no second is JAX's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet  # type: ignore[import-untyped]
import torch
import transformers


class Rows(torch.utils.data.Dataset):
    def __init__(self, folder: Path, split: str, tokenizer: Any, length: int, count: int) -> None:
        table = pyarrow.parquet.ParquetDataset(sorted(folder.glob(f"{split}*.parquet"))).read()
        if count and count < len(table):  # as experiments.glue takes some of the rows
            table = table.take(np.unique(np.linspace(0, len(table) - 1, count).astype(np.int64)))
        self.rows = tokenizer(table["sentence"].to_pylist(), truncation=True, max_length=length)
        self.labels = table["label"].to_pylist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {name: column[i] for name, column in self.rows.items()} | {"labels": self.labels[i]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--examples", type=int, default=0, help="of each split, 0 for all")
    o = parser.parse_args()
    folder = next(path for path in (Path(o.data, "sst2"), Path(o.data, "glue", "sst2")) if path.is_dir())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(o.model) / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    train, held_out = (Rows(folder, split, tokenizer, o.length, o.examples) for split in ("train", "validation"))
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        o.model, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0, dtype=torch.float32)  # fmt: skip
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"))  # fmt: skip
    cuda, steps = torch.cuda.is_available(), round(o.epochs * len(train) / o.batch)
    arguments = transformers.TrainingArguments(
        output_dir=o.out, num_train_epochs=o.epochs, per_device_train_batch_size=o.batch,
        per_device_eval_batch_size=o.eval_batch, learning_rate=o.lr, weight_decay=0.1, warmup_steps=round(0.06 * steps),
        lr_scheduler_type="linear", bf16=cuda, use_cpu=not cuda, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="accuracy", logging_steps=10, report_to=[],
        disable_tqdm=True, save_total_limit=2, label_names=["labels"],
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float(np.mean(np.argmax(found.predictions, -1) == found.label_ids))},
    )  # fmt: skip
    loop = trainer.train().metrics["train_runtime"]
    accuracy = max(row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row)
    print(json.dumps({"accuracy": accuracy, "loop": loop, "steps": trainer.state.global_step}), flush=True)


if __name__ == "__main__":
    main()
