"""Rows of text, CSV, JSONL and Parquet files, one by one and by their number, however many there are.

Of a file only where its rows begin is kept, 8 bytes each; a row is read when it is asked for. Of Parquet only the
groups of rows used last are in memory, and of them only the columns that are wanted (it needs pyarrow: the extra
`parquet`).
"""

import csv
import io
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from kinema.errors import UserError

CHUNK = 1 << 20  # bytes searched for ends of rows at once
GROUPS = 8  # groups of rows of a Parquet file that stay in memory
SUFFIXES = (".csv", ".jsonl", ".parquet", ".txt")
COLUMNS = ("caption", "text", "prompt")
TEXT = "caption"  # what the only column of a text file is called

Row = dict[str, Any]


class Lines:
    """The rows of a text, CSV or JSONL file (UTF-8), by number; `kind` is its suffix unless told otherwise."""

    def __init__(self, path: Path, kind: str | None = None):
        self.path, self._kind = path, kind or path.suffix
        with open(path, "rb") as file:
            self._mark = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        self._starts = _starts(path, self._mark, quoted=self._kind == ".csv")
        self._names: list[str] = []
        if self._kind == ".csv" and len(self._starts) > 1:
            with open(path, "rb") as file:
                self._names = next(csv.reader([self._text(0, file)]), [])
            self._starts = self._starts[1:]

    @property
    def names(self) -> list[str]:
        """The columns; of a JSONL file those of its first row."""
        if self._kind == ".jsonl":
            return [*next((row for row in self if row), {})]
        return self._names or [TEXT]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        with open(self.path, "rb") as file:
            return self._row(number, self._text(number, file))

    def __iter__(self) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            for number in range(len(self)):
                yield self._row(number, self._text(number, file))

    def _row(self, number: int, text: str) -> Row:
        if self._kind == ".csv":
            values = next(csv.reader(io.StringIO(text, newline="")), [])
            return dict(itertools.zip_longest(self._names, values[: len(self._names)], fillvalue=""))
        if self._kind == ".txt":
            return {TEXT: text}
        if not text.strip():
            return {}
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"row {number + 1}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"row {number + 1} is no object with names")
        return row

    def _text(self, number: int, file: BinaryIO) -> str:
        begin, end = int(self._starts[number]), int(self._starts[number + 1])
        if file.tell() != begin:
            file.seek(begin)
        return file.read(end - begin).decode().rstrip("\r\n")


class Parquet:
    """The rows of a Parquet file, by number; `columns` None are all."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None):
        try:
            from pyarrow.parquet import ParquetFile  # type: ignore[reportMissingImports]
        except ImportError:
            raise UserError(f"reading {path} needs pyarrow: pip install 'kinema[parquet]'") from None
        self.path, self._file = path, ParquetFile(path)
        self.names: list[str] = list(self._file.schema_arrow.names)
        self._columns = [name for name in columns if name in self.names] if columns is not None else None
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64) if sizes else np.zeros(1, dtype=np.int64)
        self._kept: OrderedDict[int, list[Row]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        group = int(np.searchsorted(self._ends, number, side="right"))
        rows = self._kept.pop(group, None) or self._file.read_row_group(group, self._columns).to_pylist()
        self._kept[group] = rows
        if len(self._kept) > GROUPS:
            self._kept.popitem(last=False)
        return rows[number - (int(self._ends[group - 1]) if group else 0)]

    def __iter__(self) -> Iterator[Row]:
        for part in self._file.iter_batches(columns=self._columns):
            yield from part.to_pylist()


Table = Lines | Parquet


def table(path: Path, columns: Sequence[str] | None = None) -> Table:
    """UserError for a file that is missing or of another kind."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)}; give such a file")
    try:
        return Parquet(path, columns) if path.suffix == ".parquet" else Lines(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); give a file that exists") from error


def files(path: Path) -> list[Path]:
    """A file, or the tables of a folder in the order of their names. UserError if there are none."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in found if file.suffix in SUFFIXES and file.exists()]
    if not found:
        raise UserError(f"there are no captions at {path}; give a {', '.join(SUFFIXES)} file or a folder of them")
    return found


class Kept(Sequence):
    """Rows of several tables in order, without those that `keep` says no to, each turned into a value by `value`."""

    def __init__(self, tables: Sequence[Table], keep: Callable[[Table, Row], bool], value: Callable[[Table, Row], Any]):
        self._tables, self._value = tables, value
        self._numbers = [
            np.fromiter((n for n, row in enumerate(rows) if keep(rows, row)), dtype=np.int64) for rows in tables
        ]
        self._ends = np.cumsum([len(numbers) for numbers in self._numbers])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[which - 1]) if which else 0)
        rows = self._tables[which]
        return self._value(rows, rows[int(self._numbers[which][local])])


def captions_of(path: Path, column: str | None = None) -> Sequence[str]:
    """The texts of a column, without the blank ones. UserError where there are none or the column is unclear."""
    return _found(path, column, (), lambda row, name: str(row[name]).strip())


def scored_captions_of(path: Path, column: str | None, score: str | None) -> Sequence[tuple[str, float | None]]:
    """The same, each with the number in the column `score`, None where there is none."""

    def value(row: Row, name: str) -> tuple[str, float | None]:
        number = row.get(score) if score else None
        return str(row[name]).strip(), None if number in (None, "") else float(number)

    return _found(path, column, (score,) if score else (), value)


def _found(path: Path, column: str | None, also: Sequence[str], value: Callable[[Row, str], Any]) -> Sequence[Any]:
    try:
        tables = [table(file) for file in files(path)]
        names = {id(rows): _column(rows, column) for rows in tables if len(rows)}
        wanted = [
            Parquet(rows.path, [names[id(rows)], *also]) if isinstance(rows, Parquet) and len(rows) else rows
            for rows in tables
        ]
        names = {id(now): names[id(rows)] for rows, now in zip(tables, wanted, strict=True) if len(rows)}
        kept = Kept(
            wanted,
            lambda rows, row: bool(str(row.get(names[id(rows)]) or "").strip()),
            lambda rows, row: value(row, names[id(rows)]),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the captions in {path} ({error}); repair or remove it") from error
    if not len(kept):
        raise UserError(f"{path} has no captions; write at least one")
    return kept


def _column(rows: Table, wanted: str | None) -> str:
    fitting = [wanted] if wanted else [name for name in COLUMNS if name in rows.names]
    if len(fitting) != 1 or fitting[0] not in rows.names:
        known = ", ".join(rows.names)
        raise UserError(f"which column of {rows.path} holds the captions? it has {known}; name one as `column`")
    return fitting[0]


def _starts(path: Path, first: int, quoted: bool) -> np.ndarray:
    """Where the rows begin, and the end of the file. In a CSV, ends of lines within quotes end no row."""
    found, at, inside = [np.array([first], dtype=np.int64)], 0, 0
    with open(path, "rb") as file:
        while part := file.read(CHUNK):
            data = np.frombuffer(part, dtype=np.uint8)
            ends = np.flatnonzero(data == 10)
            if quoted:
                marks = np.flatnonzero(data == 34)
                open_ = (np.searchsorted(marks, ends) + inside) % 2
                inside = (inside + len(marks)) % 2
                ends = ends[open_ == 0]
            found.append(ends.astype(np.int64) + at + 1)
            at += len(part)
    starts = np.concatenate(found)
    if starts[-1] < at:
        starts = np.append(starts, at)
    return starts
