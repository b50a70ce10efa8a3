"""CIFAR-10 and its halves as data: what is read is what was written, and every image comes once an epoch."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import Image

from lorajax.data import IMAGES, ImageBatches, Images, load_images
from lorajax.data.feed import calls


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, pixels: np.ndarray, labels: np.ndarray, splits: tuple[str, ...] = ("train", "test")) -> Path:
    folder.mkdir(parents=True)
    cells = [{"bytes": png(x), "path": f"{i}.png"} for i, x in enumerate(pixels)]
    for split in splits:
        pq.write_table(pa.table({"img": cells, "label": pa.array(labels, pa.int64())}), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (23, 4, 5, 3), dtype=np.uint8), rng.permutation(np.arange(23) % 10)


def test_pixels_and_labels_are_those_of_the_file(drawn, tmp_path, monkeypatch):
    pixels, labels = drawn
    write(tmp_path / "cifar10", pixels, labels)
    found = load_images("cifar10", tmp_path)
    assert set(found) == {"train", "test"}
    np.testing.assert_array_equal(found["train"].pixels, pixels)
    np.testing.assert_array_equal(found["train"].labels, labels)
    monkeypatch.setenv("LORAJAX_DATA", str(tmp_path / "cifar10"))
    again = load_images("cifar10")["test"]
    assert again.fingerprint() == found["train"].fingerprint()
    assert again._replace(labels=again.labels[::-1]).fingerprint() != again.fingerprint()


def test_the_halves_split_the_classes_and_number_them_anew(drawn, tmp_path):
    pixels, labels = drawn
    folder = write(tmp_path / "plain_text", pixels, labels)
    first, second = (load_images(f"cifar10-{half}", folder.parent)["train"] for half in ("first", "second"))
    np.testing.assert_array_equal(first.pixels, pixels[labels < 5])
    np.testing.assert_array_equal(first.labels, labels[labels < 5])
    np.testing.assert_array_equal(second.pixels, pixels[labels >= 5])
    np.testing.assert_array_equal(second.labels, labels[labels >= 5] - 5)
    assert IMAGES["cifar10-first"].labels + IMAGES["cifar10-second"].labels == IMAGES["cifar10"].labels


def test_bad_sources_say_what_helps(drawn, tmp_path):
    pixels, labels = drawn
    with pytest.raises(ValueError, match="no image task 'cifar'.*Nearest: 'cifar10'"):
        load_images("cifar")
    folder = write(tmp_path / "a", pixels, labels, ("train",))
    with pytest.raises(FileNotFoundError, match=r"has no test.parquet. On a machine with the hub: `hf download"):
        load_images("cifar10", folder)
    with pytest.raises(ValueError, match=r"has labels .*, not 0..9"):
        load_images("cifar10", write(tmp_path / "b", pixels, labels + 5))
    with pytest.raises(ValueError, match="both must be at least 1"):
        ImageBatches(Images(pixels[:0], labels[:0]), 4)


def test_every_image_once_an_epoch_in_an_order_of_seed_and_epoch(drawn):
    images = Images(drawn[0], drawn[1].astype(np.int32))
    batches = ImageBatches(images, 5, seed=3)
    assert len(batches) == 5
    orders = []
    for epoch in (0, 1):
        rows = np.concatenate([batches.rows(epoch, i) for i in range(5)])
        np.testing.assert_array_equal(np.sort(rows), [-1, -1, *range(23)])
        orders.append(rows.tolist())
    again = ImageBatches(images, 5, seed=3)
    assert [r for i in range(5) for r in again.rows(1, i).tolist()] == orders[1] != orders[0]
    assert orders[0] != [r for i in range(5) for r in ImageBatches(images, 5, seed=4).rows(0, i).tolist()]
    last = batches.batch(0, 4)
    np.testing.assert_array_equal(last["weight"], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(last["pixels"][3], last["pixels"][0])
    for i, row in enumerate(batches.rows(0, 2)):
        np.testing.assert_array_equal(batches.batch(0, 2)["pixels"][i], drawn[0][row])
    with pytest.raises(IndexError, match="no batch 5 in an epoch of 5"):
        batches.batch(0, 5)
    assert [r for i in range(5) for r in ImageBatches(images, 5, shuffle=False).rows(7, i)][:23] == list(range(23))


def test_calls_stack_steps_and_micro_batches(drawn):
    batches = ImageBatches(Images(drawn[0], drawn[1].astype(np.int32)), 4, seed=1)
    made = calls(batches, accumulate=2, steps_per_call=3)(4)
    assert made["pixels"].shape == (3, 2, 2, 4, 5, 3) and made["label"].shape == (3, 2, 2)
    np.testing.assert_array_equal(made["pixels"][2].reshape(4, 4, 5, 3), batches.batch(1, 0)["pixels"])
