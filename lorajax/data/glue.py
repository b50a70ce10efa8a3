"""GLUE (Wang et al., 2019) from the hub or from a local folder of Parquet files, never one in place of the other."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorajax.data.tasks import GLUE, Examples, Task, nearest, task

HUB_ID = "nyu-mll/glue"
VARIABLE = "LORAJAX_DATA"


def load_glue(
    name: str, source: str | os.PathLike[str] | None = None, splits: Sequence[str] | None = None
) -> dict[str, Examples]:
    """Loads splits of one GLUE task.

    Args:
        name: one of ``GLUE``.
        source: a folder that holds ``<name>/<split>.parquet`` or the hub's ``<name>/<split>-00000-of-00001.parquet``,
            itself or below ``glue/``; or a hub id of the same layout. ``None`` means the folder in the environment
            variable ``LORAJAX_DATA`` if that is set, else the hub's ``nyu-mll/glue``.
        splits: names of splits, all required; by default ``train`` and the task's evaluation splits, of which
            those after the first (MNLI ``validation_mismatched``) are absent from the result where the source has none.

    Returns:
        split name -> ``Examples``; labels (n,) int32, for STS-B float32.

    Raises:
        ValueError: unknown task or split, or columns, labels or label names that differ from the hub's.
        FileNotFoundError: the folder, or a required file in it, is missing.
        ConnectionError: the hub did not answer. Both say what was tried and which command helps.
    """
    if name not in GLUE:
        raise ValueError(f"there is no GLUE task {name!r}; tasks are {', '.join(GLUE)}.{nearest(name, GLUE)}")
    spec = task(name)
    wanted = {split: True for split in splits or ("train", spec.evaluation[0])}
    if splits is None:
        wanted.update({split: False for split in spec.evaluation[1:]})
    if source is None and (folder := os.environ.get(VARIABLE)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{VARIABLE}={folder} is not a folder. {_way_out(name)}")
        source = folder
    source = HUB_ID if source is None else source
    if Path(source).is_dir():
        return _from_folder(spec, Path(source), wanted)
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"task {name!r}: {source} is neither a folder nor a hub id. {_way_out(name)}")
    return _from_hub(spec, source, wanted)


def _way_out(name: str) -> str:
    return (
        f"On a machine with the hub: `hf download {HUB_ID} --repo-type dataset --include '{name}/*' --local-dir glue`; "
        f"then give that folder as the data source or set {VARIABLE} to it. "
        f"Or take the task 'reviews', which needs no hub."
    )


def _from_folder(spec: Task, root: Path, wanted: dict[str, bool]) -> dict[str, Examples]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    tried = [root / spec.name, root / "glue" / spec.name]
    folder = next((path for path in tried if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"task {spec.name!r}: no folder {tried[0]} and no folder {tried[1]}. {_way_out(spec.name)}"
        )
    loaded = {}
    for split, required in wanted.items():
        if paths := split_files(folder, split):
            table = pyarrow.parquet.ParquetDataset([str(path) for path in paths]).read()
            loaded[split] = _examples(spec, table, f"{folder}, split {split!r}")
        elif required:
            there = sorted(path.name for path in folder.iterdir())
            message = f"task {spec.name!r}: {folder} has no {split}.parquet; it has {', '.join(there) or 'no files'}."
            raise FileNotFoundError(f"{message} {_way_out(spec.name)}")
    return loaded


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or its shards in order; empty when there are none."""
    single = folder / f"{split}.parquet"
    if single.is_file():
        return [single]
    shards = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if shards and len(shards) != (count := int(shards[0].stem.rsplit("-", 1)[1])):
        raise FileNotFoundError(f"{folder} has {len(shards)} of the {count} shards of split {split!r}; fetch it again.")
    return shards


def _from_hub(spec: Task, hub_id: str, wanted: dict[str, bool]) -> dict[str, Examples]:
    import datasets

    where = f"task {spec.name!r}: no folder {hub_id!r} here, so the hub was asked for {hub_id}"
    try:
        found = datasets.load_dataset(hub_id, spec.name)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(f"{where}: it has no such data set ({error}). {_way_out(spec.name)}") from error
    except OSError as error:
        raise ConnectionError(f"{where}: {type(error).__name__}: {error}. {_way_out(spec.name)}") from error
    for split, required in wanted.items():
        if required and split not in found:
            there = list(found)
            raise ValueError(f"{where}: there is no split {split!r}, only {', '.join(there)}.{nearest(split, there)}")
    arrow = {split: found[split].with_format("arrow")[:] for split in wanted if split in found}
    return {split: _examples(spec, table, f"{hub_id}, split {split!r}") for split, table in arrow.items()}


def _examples(spec: Task, table: Any, where: str) -> Examples:
    """Checks the columns of an Arrow table against the table of tasks and takes them out."""
    missing = [column for column in (*spec.text, "label") if column not in table.column_names]
    if missing:
        raise ValueError(
            f"task {spec.name!r}: {where} has columns {table.column_names}, not {missing}."
            f"{nearest(missing[0], table.column_names)} The hub's layout is {[*spec.text, 'label', 'idx']}."
        )
    # The package `datasets` leaves its features in the schema, in files and in memory.
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    if names is not None and tuple(names) != spec.labels:
        raise ValueError(f"task {spec.name!r}: {where} codes its labels as {names}, the hub as {list(spec.labels)}")
    texts = tuple(table[column].to_pylist() for column in spec.text)
    raw = table["label"].to_pylist()
    empty = sum(value is None for column in (*texts, raw) for value in column)
    if empty:
        raise ValueError(f"task {spec.name!r}: {where} has {empty} empty cells in {[*spec.text, 'label']}")
    labels = np.asarray(raw, np.float32 if spec.regression else np.int32)
    if not spec.regression and not np.isin(labels, range(spec.outputs)).all():
        raise ValueError(
            f"task {spec.name!r}: {where} has labels {sorted(set(raw))}, not 0..{spec.outputs - 1} "
            f"(-1 marks the hub's unlabelled test splits)"
        )
    if spec.regression and not np.isfinite(labels).all():
        raise ValueError(f"task {spec.name!r}: {where} has scores that are not finite")
    return Examples(texts, labels)
