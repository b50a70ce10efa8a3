"""Where examples come from: the table of tasks, GLUE from folder or hub, the review archive."""

import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lorajax.data import GLUE, TASKS, Examples, load_glue, load_reviews, majority, task
from lorajax.data.reviews import ROWS, SNIPPETS, in_validation, key, parse, read_snippets, split

REAL = os.environ.get("LORAJAX_DATA")
CACHE = Path(os.environ.get("LORAJAX_CACHE") or Path.home() / ".cache" / "lorajax")
ARCHIVE = next(iter(sorted(CACHE.rglob("vaderSentiment-0.5*"))), None) if CACHE.is_dir() else None


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LORAJAX_DATA", raising=False)
    rte = dict(sentence1=["a b", "c", "é"], sentence2=["d", "e f", ""], label=[0, 1, 1], idx=[0, 1, 2])
    write(tmp_path / "glue/rte/train.parquet", **rte)
    write(tmp_path / "glue/rte/validation.parquet", **{name: values[:1] for name, values in rte.items()})
    stsb = dict(sentence1=["a"], sentence2=["b"], label=pa.array([3.8], pa.float32()), idx=[0])
    for name in ("train", "validation"):
        write(tmp_path / f"glue/stsb/{name}.parquet", **stsb)
    mnli = dict(premise=["p"], hypothesis=["h"], label=[2], idx=[0])
    for name in ("train", "validation_matched"):
        write(tmp_path / f"glue/mnli/{name}-00000-of-00001.parquet", **mnli)
    return tmp_path


def test_table():
    assert GLUE == ("cola", "sst2", "mrpc", "rte", "stsb", "qnli", "mnli", "qqp", "wnli")
    headlines = {name: spec.headline for name, spec in TASKS.items()}
    assert headlines == dict.fromkeys(TASKS, "accuracy") | {"cola": "matthews", "stsb": "pearson"}
    assert {name: spec.outputs for name, spec in TASKS.items()} == dict.fromkeys(TASKS, 2) | {"stsb": 1, "mnli": 3}
    assert [name for name, spec in TASKS.items() if spec.regression] == ["stsb"]
    assert task("mnli").evaluation == ("validation_matched", "validation_mismatched")


@pytest.mark.parametrize("wrong, near", [("sst", "sst2"), ("STS-B", "stsb"), ("review", "reviews")])
def test_unknown_task_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"no task '{wrong}'.* cola.* Nearest: '{near}'"):
        task(wrong)


def test_unknown_glue_task_names_the_nearest(folder):
    with pytest.raises(ValueError, match="no GLUE task 'qnly'.* Nearest: 'qnli'"):
        load_glue("qnly", folder)


@pytest.mark.parametrize("below", ["", "glue"])
def test_folder(folder, below):
    splits = load_glue("rte", folder / below)
    assert list(splits) == ["train", "validation"]
    assert splits["train"].texts == (["a b", "c", "é"], ["d", "e f", ""])
    np.testing.assert_array_equal(splits["train"].labels, np.array([0, 1, 1], np.int32), strict=True)
    assert splits["validation"].texts == (["a b"], ["d"])


def test_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("LORAJAX_DATA", str(folder))
    np.testing.assert_array_equal(load_glue("stsb")["train"].labels, np.array([3.8], np.float32), strict=True)


def test_hub_file_names_and_optional_split(folder):
    assert list(load_glue("mnli", folder)) == ["train", "validation_matched"]
    with pytest.raises(FileNotFoundError, match=r"no validation_mismatched\.parquet; it has train-00000-of-00001"):
        load_glue("mnli", folder, ["validation_mismatched"])
    mnli = dict(premise=["q", "r"], hypothesis=["h", "i"], label=[0, 1], idx=[0, 1])
    write(folder / "glue/mnli/validation_mismatched-00000-of-00002.parquet", **mnli)
    with pytest.raises(FileNotFoundError, match="1 of the 2 shards of split 'validation_mismatched'"):
        load_glue("mnli", folder)
    write(folder / "glue/mnli/validation_mismatched-00001-of-00002.parquet", **{k: v[:1] for k, v in mnli.items()})
    assert load_glue("mnli", folder)["validation_mismatched"].texts[0] == ["q", "r", "q"]


def test_missing_task_says_what_was_tried(folder):
    with pytest.raises(FileNotFoundError) as error:
        load_glue("cola", folder)
    tried = [str(folder / "cola"), str(folder / "glue/cola")]
    for words in (*tried, "hf download nyu-mll/glue", "LORAJAX_DATA", "cola/*"):
        assert words in str(error.value)


def test_missing_folder_is_not_replaced_by_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setenv("LORAJAX_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="LORAJAX_DATA=.*gone is not a folder.*hf download"):
        load_glue("rte")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load_glue("rte", tmp_path / "gone")


def test_unreachable_hub_says_so(monkeypatch):
    def unreachable(*asked):
        assert asked == ("nyu-mll/glue", "rte")
        raise ConnectionError("Couldn't reach it")

    monkeypatch.delenv("LORAJAX_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"asked for nyu-mll/glue.*Couldn't reach it.*hf download.*'reviews'"):
        load_glue("rte")


def test_hub(monkeypatch):
    def answer(hub_id, name):
        assert (hub_id, name) == ("someone/copy", "cola")
        split = datasets.Dataset.from_dict({"sentence": ["x", "y"], "label": [1, 0], "idx": [0, 1]})
        return datasets.DatasetDict({"train": split, "validation": split.select([1])})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    splits = load_glue("cola", "someone/copy")
    assert splits["train"].texts == (["x", "y"],) and splits["validation"].labels.tolist() == [0]
    with pytest.raises(ValueError, match="no split 'validatoin', only train, validation. Nearest: 'validation'"):
        load_glue("cola", "someone/copy", ["validatoin"])


def test_hub_without_an_optional_split(monkeypatch):
    rows = datasets.Dataset.from_dict({"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]})
    answer = datasets.DatasetDict({"train": rows, "validation_matched": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: answer)
    assert list(load_glue("mnli", "someone/copy")) == ["train", "validation_matched"]


def test_columns_labels_and_names_are_checked(folder):
    where = folder / "glue/rte"
    write(where / "train.parquet", sentence=["a"], sentence2=["b"], label=[0])
    with pytest.raises(ValueError, match=r"not \['sentence1'\]\. Nearest: 'sentence'"):
        load_glue("rte", folder)
    write(where / "train.parquet", sentence1=["a"], sentence2=["b"], label=[-1])
    with pytest.raises(ValueError, match=r"labels \[-1\], not 0\.\.1 .*unlabelled"):
        load_glue("rte", folder)
    write(where / "train.parquet", sentence1=["a", None], sentence2=["b", "c"], label=[0, 1])
    with pytest.raises(ValueError, match="1 empty cells"):
        load_glue("rte", folder)
    swapped = datasets.Dataset.from_dict(
        {"sentence1": ["a"], "sentence2": ["b"], "label": [0]},
        features=datasets.Features(
            sentence1=datasets.Value("string"),
            sentence2=datasets.Value("string"),
            label=datasets.ClassLabel(names=["not_entailment", "entailment"]),
        ),
    )
    pa.parquet.write_table(swapped.data.table, where / "train.parquet")
    with pytest.raises(ValueError, match="codes its labels as .'not_entailment', 'entailment'., the hub as"):
        load_glue("rte", folder)


def test_fingerprint_tells_data_apart():
    base = Examples((["ab", "c"],), np.array([0, 1], np.int32))
    again = Examples((["ab", "c"],), np.array([0, 1], np.int32))
    others = [
        Examples((["a", "bc"],), base.labels),
        Examples((["c", "ab"],), base.labels),
        Examples(base.texts, np.array([1, 1], np.int32)),
    ]
    assert base.fingerprint() == again.fingerprint()
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 4


SIZES = {  # data/README.md of the offline folder
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "stsb": (5749, 1500),
    "qnli": (11803, 5463),
    "mnli": (12925, 9815),
    "qqp": (34688, 7599),
    "wnli": (635, 71),
}


@pytest.mark.data
@pytest.mark.skipif(REAL is None, reason="LORAJAX_DATA does not name a data folder")
@pytest.mark.parametrize("name", GLUE)
def test_real_glue(name):
    spec, splits = task(name), load_glue(name)
    assert (len(splits["train"].labels), len(splits[spec.evaluation[0]].labels)) == SIZES[name]
    for examples in splits.values():
        assert [len(column) for column in examples.texts] == [len(examples.labels)] * len(spec.text)
        if name == "stsb":
            assert examples.labels.dtype == np.float32 and 0 <= examples.labels.min() < examples.labels.max() <= 5
        else:
            assert sorted(set(examples.labels.tolist())) == list(range(spec.outputs))
    if name == "mnli":
        assert np.bincount(splits["validation_matched"].labels).tolist() == [3479, 3123, 3213]


LINES = "1\t2.26666666667\tA  ''fine''   film.\r\n2\t-0.6\tToo tepid\r\n3\t0.0\tNeither\r\n4\t1.5\ta fine FILM\r\n"


def test_parse():
    texts, scores = parse(LINES)
    assert texts == ["A ''fine'' film.", "Too tepid", "Neither", "a fine FILM"]
    assert scores.tolist() == [2.26666666667, -0.6, 0.0, 1.5]
    with pytest.raises(ValueError, match=r"line 2 of movieReview.* is not id, rating, text: '5\\tx\\ty'"):
        parse("1\t1.0\ta\n5\tx\ty\n")


def test_split_keeps_duplicates_together_and_drops_neutral():
    texts = [f"number {i}" for i in range(1000)]
    doubles = [f"  Number: {i}!" for i in range(1000)]
    scores = np.concatenate([np.where(np.arange(1000) % 3 == 0, -0.05, 0.05), np.zeros(500), np.full(500, 4)])
    parts = split(texts + doubles, scores)
    assert len(parts["train"].labels) + len(parts["validation"].labels) == 1500
    assert sum(int((part.labels == 0).sum()) for part in parts.values()) == 334
    keys = {name: {key(text) for text in part.texts[0]} for name, part in parts.items()}
    assert not keys["train"] & keys["validation"] and len(keys["train"] | keys["validation"]) == 1000
    assert 70 < len(keys["validation"]) < 130


@pytest.mark.parametrize(
    "text, held_out",  # printf number9 | sha256sum: f4e5f12c0e3cc9c0..., 0 modulo 10; number6: 2b0a8242e3830b72..., 2
    [("number 9", True), ("Number, 9!", True), ("number 6", False)],
)
def test_split_is_pinned(text, held_out):
    assert in_validation(text) == held_out


def archives(folder):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{SNIPPETS}")
        entry.size = len(LINES)
        tar.addfile(entry, io.BytesIO(LINES.encode()))
    name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    with zipfile.ZipFile(folder / "v.zip", "w") as archive:
        archive.writestr(name, inner.getvalue())
    with tarfile.open(folder / "v.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(inner.getvalue())
        tar.addfile(entry, io.BytesIO(inner.getvalue()))
    zipfile.ZipFile(folder / "v.zip").extractall(folder / "once")
    (folder / "twice/x").mkdir(parents=True)
    (folder / "twice/x" / SNIPPETS).write_text(LINES, newline="")
    return [folder / item for item in ("v.zip", "v.tar.gz", "once", "twice", f"twice/x/{SNIPPETS}")]


def test_archive_or_folder(tmp_path):
    for path in archives(tmp_path):
        assert read_snippets(path) == LINES, path
    with pytest.raises(ValueError, match=f"holds 4 snippets; vaderSentiment 0.5 has {ROWS}"):
        load_reviews(tmp_path / "v.zip")


def test_missing_archive_says_how_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match="no archive or folder .*pip download vaderSentiment==0.5"):
        load_reviews(tmp_path / "gone.zip")
    (tmp_path / "other.txt").write_text("nothing")
    for path in (tmp_path, tmp_path / "other.txt"):
        with pytest.raises(FileNotFoundError, match=f"holds neither {SNIPPETS}.*pip download"):
            load_reviews(path)


@pytest.mark.skipif(ARCHIVE is None, reason="the review archive is not in the cache (LORAJAX_CACHE)")
def test_real_reviews():
    parts = load_reviews(ARCHIVE)
    train, validation = parts["train"], parts["validation"]
    # counted with awk on the file: 5,242 above 0, 5,326 below, 37 at 0
    assert len(train.labels) + len(validation.labels) == 10_605 - 37
    assert int(train.labels.sum() + validation.labels.sum()) == 5242
    assert (len(train.labels), len(validation.labels)) == (9515, 1053)
    assert not {key(text) for text in train.texts[0]} & {key(text) for text in validation.texts[0]}
    assert not any(re.search(r"\s\s|^\s|\s$", text) for text in train.texts[0])
    assert round(majority(task("reviews"), train.labels, validation.labels)["accuracy"], 4) == 0.4872
