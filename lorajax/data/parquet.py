"""Columns of a text data set in a folder of Parquet files, one or several per split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorajax.data.glue import VARIABLE, split_files
from lorajax.data.tasks import nearest


def read_columns(
    name: str, split: str, columns: Sequence[str], source: str | os.PathLike[str] | None = None
) -> list[tuple[str, ...]]:
    """The rows of a split, as the values of these columns, in the file's order.

    source: a folder that holds `<split>.parquet` (or the hub's shards), itself or below `<name>/`; None for the one
    that the environment variable LORAJAX_DATA names.
    Errors: FileNotFoundError for a missing folder or split, ValueError for missing columns and empty cells.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]

    root = source or os.environ.get(VARIABLE)
    if not root:
        raise FileNotFoundError(f"no data folder for {name!r}: set {VARIABLE} to one with {name}/{split}.parquet")
    places = [Path(root) / name, Path(root)]
    files = next((found for place in places if (found := split_files(place, split))), None)
    if files is None:
        raise FileNotFoundError(f"{name!r}: neither {places[0]} nor {places[1]} has {split}.parquet; give the folder "
                                f"that has it, or set {VARIABLE} to the one above")
    table = pyarrow.parquet.ParquetDataset([str(file) for file in files]).read()
    if missing := [column for column in columns if column not in table.column_names]:
        near = nearest(missing[0], table.column_names)
        raise ValueError(f"{files[0]} has the columns {table.column_names}, not {missing}.{near}")
    values = [table[column].to_pylist() for column in columns]
    if empty := sum(value is None for column in values for value in column):
        raise ValueError(f"{files[0]} has {empty} empty cells in {list(columns)}")
    return list(zip(*values, strict=True))
