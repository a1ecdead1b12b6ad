"""Rows by their number are the rows of the file, whatever is in them, and few are in memory."""

import csv
import json
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data import tables
from kinema.data.prompts import PromptFile, PromptTable
from kinema.data.tables import Kept, Lines, captions_of, table
from kinema.errors import UserError

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12), chunk=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_rows_of_a_csv_are_those_of_the_csv_library(rows, chunk, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("id", "caption"), *rows])
    before, tables.CHUNK = tables.CHUNK, chunk
    try:
        read = Lines(path)
    finally:
        tables.CHUNK = before
    assert len(read) == len(rows) and read.names == ["id", "caption"]
    assert [(row["id"], row["caption"]) for row in (read[n] for n in range(len(read)))] == rows


def test_rows_are_read_by_number_without_being_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 1 << 16)
    path, count, words = tmp_path / "p.jsonl", 20_000, "walks through a long and winding street " * 5
    with open(path, "w") as file:
        file.writelines(f'{{"caption": "a cat number {n} {words}"}}\n' for n in range(count))
    tracemalloc.start()
    prompts = PromptTable(str(path)).prompts()
    assert len(prompts) == count and prompts[12_345].startswith("a cat number 12345 ")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < path.stat().st_size / 4


def test_prompts_of_tables_leave_out_blank_rows_and_stop_at_the_limit(tmp_path):
    rows = [{"text": "a"}, {"text": " "}, {}, {"text": "b", "other": 1}, {"text": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(PromptTable(str(tmp_path / "p.jsonl")).prompts()) == ["a", "b", "c"]
    prompts = PromptTable(str(tmp_path / "p.jsonl"), limit=2).prompts()
    assert len(prompts) == 2 and prompts[-1] == "b" and prompts[0:5] == ["a", "b"]
    with pytest.raises(IndexError):
        prompts[2]
    with pytest.raises(UserError, match="which column"):
        PromptTable(str(tmp_path / "p.jsonl"), column="caption").prompts()
    (tmp_path / "p.prompts").write_bytes(b"\xef\xbb\xbfone\r\ntwo  \n\n")
    assert list(PromptFile(str(tmp_path / "p.prompts")).prompts()) == ["one", "two"]


def test_parquet_is_read_by_groups_of_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = [f"a cat {n}" if n % 3 else "" for n in range(1000)]
    parquet.write_table(
        pyarrow.table({"caption": names, "motion": list(range(1000))}), tmp_path / "a.parquet", row_group_size=64
    )
    told = captions_of(tmp_path / "a.parquet")
    assert list(told) == [name for name in names if name] and told[500] == [name for name in names if name][500]
    rows = table(tmp_path / "a.parquet", ["caption"])
    assert rows[999] == {"caption": names[999]} and len(rows) == 1000
    for n in range(0, 1000, 50):
        assert rows[n]["caption"] == names[n]
    assert len(rows._kept) <= tables.GROUPS


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'kinema\[parquet\]'"):
        table(tmp_path / "a.parquet")


def test_kept_rows_are_counted_over_files(tmp_path):
    for name, words in (("a", "x\n\ny\n"), ("b", "z\n")):
        (tmp_path / f"{name}.txt").write_text(words)
    both = [Lines(tmp_path / "a.txt"), Lines(tmp_path / "b.txt")]
    kept = Kept(both, lambda rows, row: bool(row["caption"]), lambda rows, row: row["caption"])
    assert list(kept) == ["x", "y", "z"] and kept[-1] == "z" and kept[1:] == ["y", "z"]
