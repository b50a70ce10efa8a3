"""PEFT and lorajax train alike: ten steps of a tiny BERT, every loss, score and kept rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_models
from tiny import WORDS, glue_folder, model_folder

from experiments.bench import peft_agreement

pytestmark = pytest.mark.peft


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Threads of PyTorch wait for each other by spinning, which costs minutes on a busy machine."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    theirs = torch_models.build(
        "AutoModelForSequenceClassification", "bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, vocab_size=len(WORDS), max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    theirs.save_pretrained(root / "model")
    (root / "model" / "tokenizer.json").write_bytes((model_folder(root / "words") / "tokenizer.json").read_bytes())
    return root / "model", glue_folder(root / "data", train=60, validation=20)


@pytest.mark.parametrize("method", peft_agreement.METHODS)
def test_the_losses_of_ten_steps_agree(files: tuple[Path, Path], method: str) -> None:
    """An incomplete batch (the eighth of 60 examples in batches of 8), warm-up, decay, clipping, budgets: all in it."""
    c = peft_agreement.settings(
        method, f"task=sst2,model={files[0]},rank=2", f"--config.data={files[1]}", "--config.max_length=16",
        "--config.batch=8", "--config.shapes=1", "--config.lr=1e-2", "--config.weight_decay=0.1",
        "--config.warmup=0.2", "--config.clip=0.5",
    )  # fmt: skip
    if method == "adalora":
        with c.unlocked():
            c.controller.update(of_steps=10, t_initial=1, t_final=3, delta_t=2)
    theirs, ours = peft_agreement.compare(c, "cpu", peft_agreement.shared(c, 10))
    assert len(ours.losses) == len(theirs.losses) == 10
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    assert np.ptp(theirs.losses) > 0.05  # they move
    assert ours.scores == pytest.approx(theirs.scores)
    assert ours.kept == theirs.kept
    if method == "adalora":
        assert len(ours.kept) == 7 and sum(map(sum, ours.kept.values())) == 2 * 7
    line = peft_agreement.row("sst2", method, [(theirs, ours)] * 2)
    assert line["deviation over seeds"] == "0.000" and line["seeds"] == 2
