"""Which files a path means, and their lines, whatever they are called and however they are packed."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pl_attnedit.data.files import ParquetTable, find_files, json_rows, text_lines
from pl_attnedit.errors import UserError

KINDS = (".parquet", ".jsonl", ".txt", ".md")


def find(name: object) -> list[str]:
    return [str(file) for file in find_files("source", str(name), KINDS, "files")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"text": "x"}\n')


def test_a_name_that_is_there_is_that_file_whatever_its_characters(folder: Path) -> None:
    write("data [v2]/part [1].jsonl", "data [v2]/part 2.jsonl", "what?/a*.txt", "what?/ab.txt", "whats/a.txt")
    assert find("data [v2]/part [1].jsonl") == ["data [v2]/part [1].jsonl"]
    assert find("what?/a*.txt") == ["what?/a*.txt"]
    assert find("data [v2]/part*.jsonl") == ["data [v2]/part 2.jsonl", "data [v2]/part [1].jsonl"]
    assert find(folder / "data [v2]") == [f"{folder}/data [v2]/part 2.jsonl", f"{folder}/data [v2]/part [1].jsonl"]
    assert find("what*/**/*.txt") == ["what?/a*.txt", "what?/ab.txt", "whats/a.txt"]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    write("texts/a.txt")
    assert find("~/texts") == find("~/texts/*.txt") == find("~/texts/a.txt") == [f"{folder}/texts/a.txt"]
    with pytest.raises(UserError, match="there is no such file"):
        find("~nobody-of-this-name/a.txt")


def test_what_a_folder_means(folder: Path) -> None:
    write("all/A.TXT", "all/sub/b.Jsonl", "all/c.txt.gz", "all/.d.txt", "all/.cache/e.txt", "else/f.md", "all/._a.txt")
    os.symlink("../else", "all/linked")
    os.symlink("..", "all/sub/up")
    write("all/g.csv", "all/sub/h.jsonl.xz")
    with pytest.warns(UserWarning, match=r"not read, since they are not .*: g\.csv, sub/h\.jsonl\.xz$"):
        found = find("all")
    assert found == ["all/A.TXT", "all/c.txt.gz", "all/linked/f.md", "all/sub/b.Jsonl"]
    assert find("all/*.[tT]*") == ["all/A.TXT", "all/c.txt.gz"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.txt", "is a link to nowhere, which is not there"),
        ("links", "gone.txt.*is a link to nowhere"),
        ("a.jsonl.xz", r"must end in one of .*\.gz, \.bz2, \.zst, \.lz4 behind it"),
        ("a.parquet.gz", "must end in one of"),
        ("*.xz", r"a\.jsonl\.xz.*must end in one of"),
        ("others", r"this folder has no .* file, only b\.csv"),
        ("empty.txt", "this file is empty"),
        ("no*.txt", "no file matches"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, name: str, message: str) -> None:
    write("a.jsonl.xz", "a.parquet.gz", "others/b.csv")
    Path("empty.txt").touch()
    Path("links").mkdir()
    for link in ("gone.txt", "links/gone.txt"):
        os.symlink("nowhere", link)
    with pytest.raises(UserError, match=message):
        find(name)


def test_only_a_line_feed_ends_a_line(folder: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x0bd\x1ee"}, {"text": "é"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows) + "\n \n"
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert list(json_rows("source", Path("a.jsonl"))) == [("line 1", rows[0]), ("line 2", rows[1])]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst", ".lz4"])
def test_compressed_text(folder: Path, ending: str) -> None:
    with pa.output_stream("a.txt" + ending, compression="detect") as file:
        file.write("\ufeffone\ntwo".encode())
    assert list(text_lines("source", Path("a.txt" + ending))) == ["one\n", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", b'\n["a"]\n', "line 2 must be a JSON object, this is list"),
        (
            "a.jsonl",
            '{"text": "x"}\n'.encode("utf-16"),
            "must be UTF-8 text: line 1, byte 0 is none; it begins as UTF-16",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "must be UTF-8 text: line 2, byte 13 is none"),
        ("a.jsonl.gz", gzip.compress(os.urandom(99_999))[:-1000], "must be UTF-8 text|cannot be read: "),
        ("a.jsonl.gz", b"no gzip", "cannot be read: "),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "x"}\n')[:-9], "cannot be read: "),
    ],
)
def test_broken_lines_are_named(folder: Path, name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(json_rows("source", Path(name)))
    assert name in str(error.value)


def test_parquet_of_any_name(folder: Path) -> None:
    pq.write_table(pa.table({"text": [f"{i}" for i in range(70)], "n": list(range(70))}), "a [1].parquet")
    rows = list(ParquetTable("source", Path("a [1].parquet")).rows(["text"]))
    assert rows[0] == ("row 1", {"text": "0"})
    assert rows[69] == ("row 70", {"text": "69"})
