"""A model folder and GLUE files small enough for a whole run in seconds, in the layouts of the hub."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lorajax.models import Bert, BertConfig, params_to_hf

GOOD = "good fine warm bright funny clever moving rich".split()
BAD = "bad dull cold dim tedious silly flat poor".split()
PLAIN = "the a film plot cast scene with and but is was very quite".split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]


def model_folder(folder: Path, seed: int = 0) -> Path:
    """A BERT of 2 layers and width 16, weights drawn from `seed`."""
    folder.mkdir(parents=True)
    settings = {
        "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "gelu", "max_position_embeddings": 32,
        "type_vocab_size": 2, "pad_token_id": 0, "layer_norm_eps": 1e-12, "initializer_range": 0.3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    config = BertConfig.from_hf(settings, pooling="mean")
    variables = Bert(config).init(jax.random.key(seed), np.zeros((1, 4), np.int32))
    tensors = {name: x for name, x in params_to_hf(config, variables).items() if not name.startswith("classifier")}
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def glue_folder(folder: Path, train: int = 60, validation: int = 30, seed: int = 0) -> Path:
    """`sst2` (the label is the mood of the words) and `stsb` (the score is how many moods agree) as parquet files."""
    rng = np.random.default_rng(seed)

    def sentence(good: bool) -> str:
        mood, plain = rng.choice(GOOD if good else BAD, 2), rng.choice(PLAIN, rng.integers(1, 9))
        return " ".join(rng.permutation([*mood, *plain]))

    for split, count in (("train", train), ("validation", validation)):
        labels = rng.integers(0, 2, count)
        others = rng.integers(0, 2, count)
        first, second = [sentence(x) for x in labels], [sentence(x) for x in others]
        index = pa.array(np.arange(count), pa.int32())
        single = {"sentence": first, "label": pa.array(labels, pa.int64()), "idx": index}
        scores = pa.array(5.0 * (labels == others), pa.float32())
        pairs = {"sentence1": first, "sentence2": second, "label": scores, "idx": index}
        for name, columns in (("sst2", single), ("stsb", pairs)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), folder / name / f"{split}.parquet")
    return folder
