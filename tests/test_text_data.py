"""Data of text tasks: E2E's prompts, prompts padded on the left, and scores of generated texts by hand."""

import os
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from lorajax import language
from lorajax.data import Batches
from lorajax.data.e2e import linearised, load_e2e
from lorajax.data.parquet import read_columns
from lorajax.data.prompts import encode_prompts
from lorajax.data.text_scores import text_scores
from lorajax.data.text_tasks import MADE_UP, TEXT_TASKS, fingerprint, grouped, load_pairs


def test_a_meaning_becomes_a_prompt() -> None:
    meaning = "name[Blue Spice], customer rating[5 out of 5], near[Crowne Plaza Hotel]"
    assert linearised(meaning) == "name : Blue Spice | customer rating : 5 out of 5 | near : Crowne Plaza Hotel ||"
    for wrong in ("Blue Spice is a pub.", "", "name[Blue Spice"):
        with pytest.raises(ValueError, match="is no meaning representation such as"):
            linearised(wrong)


def test_e2e_is_read_from_parquet(tmp_path) -> None:
    for split in ("train", "validation", "test"):
        rows = {"meaning_representation": ["name[A], food[B]"] * 2, "human_reference": [f" One {split}. ", "Two."]}
        (tmp_path / "e2e_nlg").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "e2e_nlg" / f"{split}.parquet")
    prompt = "name : A | food : B ||"
    for source in (tmp_path, tmp_path / "e2e_nlg"):
        assert load_e2e(source)["test"] == [(prompt, "One test."), (prompt, "Two.")]
    assert grouped(load_e2e(tmp_path)["test"]) == ([prompt], [["One test.", "Two."]])
    with pytest.raises(ValueError, match=r"not \['human_refrence'\]. Nearest: 'human_reference'"):
        read_columns("e2e_nlg", "test", ["human_refrence"], tmp_path)
    (tmp_path / "e2e_nlg" / "test.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has test.parquet; give the folder"):
        load_e2e(tmp_path)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("LORAJAX_DATA"), reason="LORAJAX_DATA names no data folder")
def test_the_real_e2e_has_the_published_counts() -> None:
    """Novikova et al. (2017): 42,061 / 4,672 / 4,693 pairs, 4,862 / 547 / 630 meanings."""
    found = load_e2e()
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 42061, "validation": 4672, "test": 4693}
    meanings = {split: len(grouped(pairs)[0]) for split, pairs in found.items()}
    assert meanings == {"train": 4862, "validation": 547, "test": 630}


def test_made_up_pairs_are_there_for_every_task() -> None:
    for task in TEXT_TASKS.values():
        splits = load_pairs(task, MADE_UP)
        assert {"train", task.held_out, task.generated} <= splits.keys()
        seen = {prompt for prompt, _ in splits["train"]}
        assert not seen & {prompt for prompt, _ in splits[task.generated]}
        assert fingerprint(splits) == fingerprint(load_pairs(task, MADE_UP)) != fingerprint({"train": []})


def test_prompts_are_padded_on_the_left() -> None:
    tokenizer = language.tiny_tokenizer()
    texts = ["abc", "a", "abcde"]
    batches = Batches(encode_prompts(texts, tokenizer, 5), 2, shuffle=False, shapes=1)
    rows = {}
    for batch in batches.epoch():
        assert batch["input_ids"].shape == (2, 5)
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], batch["row"], strict=True):
            assert (np.diff(mask) >= 0).all()
            if row >= 0:
                rows[int(row)] = tokenizer.decode(ids[mask == 1].tolist())
    assert rows == dict(enumerate(texts))
    with pytest.raises(ValueError, match="1 to 5 tokens; what can be generated from has 1 to max_length=4"):
        encode_prompts(texts, tokenizer, 4)
    fitting = encode_prompts(texts, tokenizer, 4, drop=True)
    assert (fitting.rows.tolist(), fitting.lengths.tolist(), fitting.dropped) == ([0, 1], [3, 1], 1)
    with pytest.raises(ValueError, match="1 to 5 tokens"):
        encode_prompts(texts, tokenizer, 0, drop=True)


TEXTS = ["the cat sat on the mat today", "there is a dog here now", "a b c d e"]
REFERENCES = [["the cat sat on a mat today", "on the mat sat the cat"], ["there is one dog here"], ["a b x c d e f"]]


def test_bleu_and_rouge_by_hand() -> None:
    """Corpus BLEU-4 with clipped counts over all references and the closest length (Papineni et al., 2002); ROUGE-L
    by the textbook's longest common subsequence, best reference."""
    matched, possible = np.zeros(4), np.zeros(4)
    length = wanted = 0
    for text, references in zip(TEXTS, REFERENCES, strict=True):
        words = text.split()
        length += len(words)
        wanted += min((abs(len(r.split()) - len(words)), len(r.split())) for r in references)[1]
        for n in range(1, 5):
            grams = Counter(zip(*[words[i:] for i in range(n)], strict=False))
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                other = reference.split()
                most |= Counter(zip(*[other[i:] for i in range(n)], strict=False))
            matched[n - 1] += sum((grams & most).values())
            possible[n - 1] += sum(grams.values())
    bleu = min(1.0, np.exp(1 - wanted / length)) * np.exp(np.mean(np.log(matched / possible)))

    def common(a: list[str], b: list[str]) -> int:
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    def f1(a: list[str], b: list[str]) -> float:
        return 2 * common(a, b) / (len(a) + len(b))

    rouge = [max(f1(text.split(), r.split()) for r in refs) for text, refs in zip(TEXTS, REFERENCES, strict=True)]
    scores = text_scores(TEXTS, REFERENCES)
    assert list(scores) == ["bleu", "chrf", "rouge_l"]
    assert scores["bleu"] == pytest.approx(bleu, rel=1e-6)
    assert scores["rouge_l"] == pytest.approx(np.mean(rouge), rel=1e-6)


def test_chrf_by_hand() -> None:
    """One text: mean precision and recall of character 1- to 6-grams without spaces, F with beta 2 (Popovic, 2015)."""
    text, reference = "the cat sat", "the bat sat on"

    def grams(words: str, n: int) -> Counter[str]:
        letters = words.replace(" ", "")
        return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))

    shares = []
    for n in range(1, 7):
        a, b = grams(text, n), grams(reference, n)
        both = sum((a & b).values())
        shares.append((both / sum(a.values()), both / sum(b.values())))
    precision, recall = np.mean(shares, axis=0)
    want = 5 * precision * recall / (4 * precision + recall)
    assert text_scores([text], [[reference]])["chrf"] == pytest.approx(want, rel=1e-6)


def test_scores_of_equal_and_of_missing_texts() -> None:
    whole = text_scores(["A small cat sat there."] * 2, [["a small cat sat there."], ["x", "A small cat sat there."]])
    assert whole["bleu"] == pytest.approx(1) and whole["rouge_l"] == pytest.approx(1)
    for texts, references in (([], []), (["a"], [[]]), (["a"], [["a"], ["b"]])):
        with pytest.raises(ValueError, match="each needs one"):
            text_scores(texts, references)


def test_spaced_takes_ends_and_order() -> None:
    assert language.spaced([*range(10)], 4) == [0, 3, 6, 9]
    assert language.spaced([*range(3)], 5) == language.spaced([*range(3)], 0) == [0, 1, 2]
    assert all(a < b for a, b in pairwise(language.spaced([*range(100)], 17)))
