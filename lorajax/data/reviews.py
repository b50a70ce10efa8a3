"""``reviews``: sentiment of movie-review snippets, from a package registry instead of a model hub.

Source: ``movieReviewSnippets_GroundTruth.txt`` in the source archive of ``vaderSentiment==0.5`` (MIT licence; Hutto and
Gilbert, ICWSM 2014): 10,605 Rotten Tomatoes snippets, each with the mean rating of its human raters on a scale
from -4 to 4.

* Label: 1 (positive) for a mean rating above 0, 0 (negative) below 0; the 37 snippets rated exactly 0 are left out.
* Split: the snippet's key is its letters and digits in lower case. It is a validation example when the
  first 8 bytes of the key's sha256, as a big-endian integer, are 0 modulo 10. So the split depends on no
  library, seed or row order, and snippets that differ only in punctuation, spaces or case stay on one side.
* Text: runs of white space become one space.

The snippets come from the same reviews as SST-2: of its 872 validation sentences, 732 occur here. Never
train on one and evaluate on the other.
"""

import hashlib
import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from lorajax.data.tasks import Examples

SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
INNER = "hutto_ICWSM_2014.tar.gz"
ROWS = 10_605


def load_reviews(path: str | os.PathLike[str]) -> dict[str, Examples]:
    """Loads the ``train`` and ``validation`` splits.

    Args:
        path: the source archive ``vaderSentiment-0.5.zip`` (or ``.tar.gz``), or a folder it was extracted to.

    Returns:
        split name -> ``Examples`` with one text column and (n,) int32 labels, in file order.

    Raises:
        FileNotFoundError: no such path, or the snippets are not in it.
        ValueError: a line is not ``id <tab> rating <tab> text``, or there are not 10,605 of them.
    """
    texts, scores = parse(read_snippets(path))
    if len(texts) != ROWS:
        raise ValueError(f"{path} holds {len(texts)} snippets; vaderSentiment 0.5 has {ROWS}. Fetch the archive again.")
    return split(texts, scores)


def read_snippets(path: str | os.PathLike[str]) -> str:
    """The text of the snippets file inside an archive or folder. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        found = next(iter(sorted(path.rglob(SNIPPETS))), None) or next(iter(sorted(path.rglob(INNER))), None)
        content = _member(found.name, found.read_bytes()) if found else None
    elif path.is_file():
        content = _member(path.name, path.read_bytes())
    else:
        raise FileNotFoundError(f"no archive or folder {path}. {_WAY_OUT}")
    if content is None:
        raise FileNotFoundError(f"{path} holds neither {SNIPPETS} nor {INNER}. {_WAY_OUT}")
    return content.decode("utf-8")


_WAY_OUT = "`pip download vaderSentiment==0.5 --no-deps --no-binary :all:` fetches the archive."


def _member(name: str, data: bytes) -> bytes | None:
    """The snippets file in a file of that name: the file itself, or a member of an archive, or of the archive in it."""
    if name == SNIPPETS:
        return data
    members: dict[str, bytes] = {}
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            wanted = [item for item in archive.namelist() if Path(item).name in (SNIPPETS, INNER)]
            members = {item: archive.read(item) for item in wanted}
    elif tarfile.is_tarfile(io.BytesIO(data)):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for entry in tar:
                if Path(entry.name).name in (SNIPPETS, INNER) and (file := tar.extractfile(entry)) is not None:
                    members[entry.name] = file.read()
    # the snippets themselves before an archive that holds them
    for item in sorted(members, key=lambda item: not item.endswith(SNIPPETS)):
        if (found := _member(Path(item).name, members[item])) is not None:
            return found
    return None


def parse(content: str) -> tuple[list[str], np.ndarray]:
    """Splits the file into texts (white space collapsed) and mean ratings, (n,) float64.

    Raises:
        ValueError: a line that is not ``id <tab> rating <tab> text``, by number.
    """
    texts, scores = [], []
    for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), 1):
        if not line:
            continue
        fields = line.split("\t")
        try:
            _, score, text = fields
            scores.append(float(score))
        except ValueError as error:
            raise ValueError(f"line {number} of {SNIPPETS} is not id, rating, text: {line[:80]!r}") from error
        texts.append(" ".join(text.split()))
    return texts, np.asarray(scores, np.float64)


def split(texts: list[str], scores: np.ndarray) -> dict[str, Examples]:
    """Labels and splits snippets as the module's docstring says."""
    rows: dict[str, list[int]] = {"train": [], "validation": []}
    for row, text in enumerate(texts):
        if scores[row] != 0:
            rows["validation" if in_validation(text) else "train"].append(row)
    return {
        name: Examples(([texts[row] for row in chosen],), (scores[chosen] > 0).astype(np.int32))
        for name, chosen in rows.items()
    }


def key(text: str) -> str:
    """Letters and digits of a text in lower case: equal for texts that count as duplicates."""
    return re.sub(r"[\W_]+", "", text).lower()


def in_validation(text: str) -> bool:
    """One in ten keys, by sha256."""
    return int.from_bytes(hashlib.sha256(key(text).encode()).digest()[:8], "big") % 10 == 0
