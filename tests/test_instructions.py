"""GSM8K and Dolly: splits, the official answer extraction, exact match; constructed preferences."""

import os

import chats
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorajax.data import Batches, completion, load_dolly, load_gsm8k, mismatched, prefer
from lorajax.data.gsm8k import extract_answer, gsm8k_scores, last_number, without_annotations, wrong_answers

REAL = os.environ.get("LORAJAX_DATA")
TOKENIZER = chats.tokenizer()


def official(text):
    """`extract_answer` of grade_school_math/dataset.py, without a regular expression."""
    start = text.find("#### ")
    while start >= 0:
        rest = text[start + 5 :]
        sign, rest = ("-", rest[1:]) if rest[:1] == "-" else ("", rest)
        digits = rest[: next((i for i, c in enumerate(rest) if c not in "0123456789.,"), len(rest))]
        if digits:
            return sign + digits.replace(",", "")
        start = text.find("#### ", start + 1)
    return None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("... 72 clips.\n#### 72", "72"), ("#### 109,200,000", "109200000"), ("#### -3", "-3"), ("#### 0.75\n", "0.75"),
        ("so\n#### 18.\nand more 5", "18."), ("#### $18", None), ("####18", None), ("18", None), ("#### 1 #### 2", "1"),
        ("#### x #### -2,5", "-25"),
    ],
)  # fmt: skip
def test_the_answer_is_what_the_official_evaluation_reads(text, want):
    assert extract_answer(text) == want == official(text)


def test_last_number_and_scores():
    numbers = {"She pays $1,234.50.": "1234.50", "so 3, 4": "4", "-7 it is": "-7", "none": None, "It is 18.": "18"}
    assert {text: last_number(text) for text in numbers} == numbers
    texts = ["a\n#### 72", "It is 72.", "#### 72.0", "no idea", "#### 1,072"]
    references = [["x\n#### 72"]] * 4 + [["y #### 5", "z #### 1072"]]
    assert gsm8k_scores(texts, references) == {"exact_match": 2 / 5, "last_number": 4 / 5}


def test_wrong_answers_differ_in_the_last_number_alone():
    pairs = [(f"q{i}", f"It is <<{i}*2={2 * i}>>{2 * i}.\n#### {2 * i:,}") for i in range(400, 700)]
    pairs += [("half", "#### 1.50"), ("debt", "#### -1")]
    rows = wrong_answers(pairs, seed=1)
    assert rows == wrong_answers(pairs, seed=1) != wrong_answers(pairs, seed=2)
    off = []
    for (question, answer), (asked, right, wrong) in zip(pairs, rows, strict=True):
        assert (asked, right) == (question, answer) and wrong.split("####")[0] == answer.split("####")[0]
        off.append(float(extract_answer(wrong)) - float(extract_answer(answer)))
    assert {round(x, 9) for x in off} == {x for x in range(-10, 11) if x}
    with pytest.raises(ValueError, match="no number behind '####'"):
        wrong_answers([("q", "none")])


def test_mismatched_texts_are_never_the_prompts_own():
    pairs = [("a", "1"), ("a", "2"), ("b", "3"), ("c", "1"), ("b", "4")]
    own = {"a": {"1", "2"}, "b": {"3", "4"}, "c": {"1"}}
    for seed in range(20):
        rows = mismatched(pairs, seed=seed)
        assert [row[:2] for row in rows] == pairs and rows == mismatched(pairs, seed=seed)
        assert all(other not in own[prompt] for prompt, _, other in rows)
    assert len({str(mismatched(pairs, seed=seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="every text of these 2 pairs is one of the prompt 'a'"):
        mismatched([("a", "1"), ("a", "2")])


def test_preference_batches_by_hand():
    texts = [("Is it?", " yes", " no, it is Paris"), ("Peru?", " Lima", ""), ("And?", " so", " it is")]
    pairs = [(completion(a, b), completion(a, c)) for a, b, c in texts]
    with pytest.raises(ValueError, match="1 of 3 texts, the first number 1, have no token to learn"):
        prefer(pairs, TOKENIZER, max_length=40)
    found = prefer(pairs, TOKENIZER, max_length=40, drop=True)
    assert found.dropped == 1 and found.chosen.rows.tolist() == found.rejected.rows.tolist() == [0, 2]
    batch = Batches(found, 3, shuffle=False, shapes=1).batch(0, 0)
    length = batch["input_ids"].shape[-1]
    assert {x.shape for name, x in batch.items() if name != "weight"} == {(3, 2, length)}
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0]
    for row, (prompt, *answers) in enumerate([texts[0], texts[2]]):
        for side, answer in enumerate(answers):
            learned = batch["labels"][row, side][batch["completion"][row, side] > 0]
            assert learned.tolist() == TOKENIZER.encode(answer).ids
            ids = batch["input_ids"][row, side][batch["segments"][row, side] > 0]
            assert ids.tolist() == TOKENIZER.encode(prompt + answer).ids
    again = prefer(pairs, TOKENIZER, max_length=40, drop=True)
    assert found.fingerprint() == again.fingerprint() != found._replace(chosen=found.rejected).fingerprint()


def write(folder, name, **columns):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), folder / name / f"{split}.parquet")


def test_folders(tmp_path):
    answers = [f"<<1+{i}={i + 1}>>{i + 1}\n#### {i + 1}" for i in range(40)]
    write(tmp_path, "gsm8k", question=[f"question {i}" for i in range(40)], answer=answers)
    found = load_gsm8k(tmp_path)
    assert len(found["test"]) == 40 == len(found["train"]) + len(found["validation"]) and found["validation"]
    assert sorted(found["train"] + found["validation"]) == sorted(found["test"])
    assert load_gsm8k(tmp_path / "gsm8k", annotations=False)["test"][3] == ("question 3", "4\n#### 4")
    write(tmp_path, "gsm8k", question=["q"], answer=["no number"])
    with pytest.raises(ValueError, match="an answer of split 'train' has no number behind '####': 'no number'"):
        load_gsm8k(tmp_path)
    columns = {"instruction": ["Say it. ", "Read."], "context": ["", "A text.\n"], "response": [" Yes.", "Read it."]}
    write(tmp_path, "dolly", **columns)
    rows = load_dolly(tmp_path)
    assert sorted(rows["train"] + rows["validation"]) == [("Read.\n\nA text.", "Read it."), ("Say it.", "Yes.")]


@pytest.mark.data
@pytest.mark.skipif(REAL is None, reason="LORAJAX_DATA does not name a data folder")
def test_real_gsm8k_and_dolly():
    found = load_gsm8k()
    assert len(found["train"]) + len(found["validation"]) == 7473 and len(found["test"]) == 1319
    assert 600 < len(found["validation"]) < 900 and not set(found["train"]) & set(found["validation"])
    for pairs in found.values():
        answers = [answer for _, answer in pairs]
        assert all(extract_answer(answer) == official(answer) for answer in answers)
        assert set(gsm8k_scores(answers, [[answer] for answer in answers]).values()) == {1.0}
        wrong = [row[2] for row in wrong_answers(pairs)]
        assert gsm8k_scores(wrong, [[answer] for answer in answers])["exact_match"] == 0.0
        assert not any("<<" in without_annotations(answer) for answer in answers)
    rows = load_dolly()
    assert len(rows["train"]) + len(rows["validation"]) == 2996 and 200 < len(rows["validation"]) < 400
    assert all(prompt and text for pairs in rows.values() for prompt, text in pairs)
    assert np.mean(["\n\n" in prompt for prompt, _ in rows["train"]]) > 0.1
