"""Manifests as spreadsheets, shops and people write them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.catalog.delimited import read_delimited
from millicent.catalog.manifest import BadRow, Columns, Row, read_manifest
from millicent.catalog.text_lines import TextLines
from millicent.errors import InputError, InputNotFoundError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(data: str | bytes, name: str = "products.csv") -> str:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return make


def read(path: str, **columns: Any) -> list[Row | BadRow]:
    return list(read_manifest(path, Columns(**columns) if columns else None))


def rows(path: str, **columns: Any) -> list[Row]:
    found = read(path, **columns)
    assert all(isinstance(row, Row) for row in found), found
    return [row for row in found if isinstance(row, Row)]


def bad(path: str, **columns: Any) -> dict[int, str]:
    return {row.line: row.why for row in read(path, **columns) if isinstance(row, BadRow)}


def test_a_row_of_a_csv(write: Write, tmp_path: Path) -> None:
    path = write(
        "sku,title,image,price\nA1,Shirt,pictures/a1.png,19.90\nA2,Mug,/abs/mug.jpg,5\nA3,Cap,https://cdn.example.com/c.png?v=1,6\n"
    )
    one, two, three = rows(path)
    assert one == Row(
        2,
        "A1",
        str(tmp_path / "pictures/a1.png"),
        (),
        {"sku": "A1", "title": "Shirt", "image": "pictures/a1.png", "price": "19.90"},
    )
    assert two.picture == "/abs/mug.jpg"
    assert three.picture == "https://cdn.example.com/c.png?v=1"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_delimiters_and_line_ends(write: Write, encoding: str, delimiter: str, end: str) -> None:
    lines = [["sku", "größe", "picture"], ["A1", 'groß, sehr; "groß"\tja|nein', "ä.png"], ["A2", f"zwei{end}Zeilen", "b.png"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(lines)
    data = b"\xff\xfe" + text.getvalue().encode("utf-16-le") if encoding == "utf-16-le-bom" else text.getvalue().encode(encoding)
    one, two = rows(write(data))
    assert one.columns == {"sku": "A1", "größe": lines[1][1], "picture": "ä.png"}
    assert (one.line, two.line, two.columns["größe"]) == (2, 3, f"zwei{end}Zeilen")


def test_excels_own_mark_of_the_delimiter_and_its_empty_rows(write: Write) -> None:
    one, two = rows(write("sep=;\r\nsku;picture;;\r\nA,1;a.png;;\r\n;;;\r\n\r\nA2;b.png;;\r\n"))
    assert one.columns == {"sku": "A,1", "picture": "a.png"}
    assert (one.line, two.line) == (3, 6)


def test_a_quoted_line_end_counts_as_an_editor_counts(write: Write) -> None:
    path = write('sku,note,picture\nA1,"one\ntwo\nthree",a.png\nA2,x,\nA3,y,c.png\n')
    assert [row.line for row in read(path)] == [2, 5, 6]
    assert "empty" in bad(path)[5]


def test_bytes_that_are_no_utf_8_are_told_by_line(write: Write) -> None:
    path = write("sku,title,picture\nA1,Caf\u00e9,a.png\nA2,Mug,b.png\n".encode("cp1252"))
    assert [row.line for row in read(path)] == [2, 3]
    why = bad(path)[2]
    assert "Line 2, character 7 is the byte 0xe9" in why
    assert "'\u00e9'" in why
    assert rows(path, encoding="cp1252")[0].columns["title"] == "Caf\u00e9"


def test_a_header_that_is_no_utf_8_ends_the_run(write: Write) -> None:
    path = write("sku,gr\u00f6\u00dfe,picture\nA1,x,a.png\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"The header of .*character 7 is the byte 0xf6"):
        read(path)


def test_utf_16_without_its_mark_is_told(write: Write) -> None:
    with pytest.raises(InputError, match="NUL"):
        read(write("sku,picture\nA1,a.png\n".encode("utf-16-le")))


def test_half_a_character_of_utf_16(write: Write) -> None:
    data = "sku,picture\nA1,a.png\nA2,\U0001f455.png\n".encode("utf-16")
    assert "cannot be read as utf-16" in bad(write(data[:-12] + data[-10:]))[3]


def test_an_unknown_encoding(write: Write) -> None:
    for name in ("klingon", "hex"):
        with pytest.raises(InputError, match="no text encoding"):
            read(write("sku,picture\n"), encoding=name)


def test_bad_rows_are_named_and_the_others_go_on(write: Write) -> None:
    path = write(
        "sku,title,picture\n"
        "A1,ok,a.png\n"
        "A2,too few\n"
        "A3,too,many,b.png\n"
        "A4,,\n"
        ",no id,c.png\n"
        "A\0,nul,d.png\n"
        "A1,again,e.png\n"
        "a1,again in small,f.png\n"
        'A7,"unquoted" end,g.png\n'
        "A8,ftp,ftp://example.com/x.png\n"
        "A9,ok,h.png\n"
    )
    found = bad(path)
    assert sorted(found) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    for line, word in {
        3: "2 values, the header 3", 4: "4 values", 5: "'picture' is empty", 6: "'sku' is empty", 7: "NUL", 8: "was on line 2",
        9: "was on line 2", 10: "quotes", 11: "ftp",
    }.items():  # fmt: skip
        assert word in found[line], found[line]
    assert [row.id for row in read(path) if isinstance(row, Row)] == ["A1", "A9"]


def test_ids_that_differ_in_composition_alone_are_one(write: Write) -> None:
    assert "was on line 2" in bad(write("sku,picture\nCaf\u00e9,a.png\nCafe\u0301,b.png\n"))[3]


def test_an_open_quote_does_not_swallow_the_file(write: Write) -> None:
    lines = ["sku,note,picture", "A1,ok,a.png", 'A2,"not closed,b.png', *(f"B{n},{'x' * 1000},c{n}.png" for n in range(1000))]
    found = read(write("\n".join(lines)))
    opened = [row for row in found if isinstance(row, BadRow)]
    assert opened[0].line == 3
    assert "not closed: lines 3 to" in opened[0].why
    assert found[-1] == rows(write(f"{lines[0]}\n{lines[-1]}", "last.csv"))[0].__class__(
        len(lines),
        "B999",
        found[-1].picture,
        (),
        found[-1].columns,  # type: ignore[union-attr]
    )
    assert len(found) > 800


def test_an_open_quote_at_the_end(write: Write) -> None:
    assert "not closed" in bad(write('sku,picture\nA1,a.png\nA2,"b.png\n'))[3]


def test_a_prompt_of_ten_thousand_characters(write: Write) -> None:
    assert len(rows(write(f"sku,prompt,picture\nA1,{'x' * 10_000},a.png\n"))[0].columns["prompt"]) == 10_000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("sku,title\nA1,x\n", "No column holds the picture; there are sku, title"),
        ("sku,picture,SKU\n", "two columns named sku"),
        (",,\n", "empty header"),
        ('sku,"picture\n', "header"),
    ],
)
def test_headers_that_cannot_be_used(write: Write, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read(write(text))


def test_a_line_without_end_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match="more than 4,000,000 characters"):
        read(write("sku,picture\n" + "x" * 4_000_001))


def test_columns_by_name(write: Write, tmp_path: Path) -> None:
    path = write("Artikel,Bild,Detail,picture\n17,a.png,b.png,c.png\n")
    (row,) = rows(path, id="artikel", picture="BILD", more=("Detail",))
    assert (row.id, row.picture, row.more_pictures) == ("17", str(tmp_path / "a.png"), (str(tmp_path / "b.png"),))
    (row,) = rows(path, picture="Bild")
    assert row.id == "a"
    with pytest.raises(InputError, match="no column 'sku' for the id; there are Artikel, Bild"):
        read(path, id="sku")


def test_numbered_columns_are_further_references(write: Write, tmp_path: Path) -> None:
    one, two = rows(write("sku,image_2,image,Image 3,image_alt\nA1,b.png,a.png,c.png,x\nA2,,d.png,,\n"))
    assert [Path(place).name for place in (one.picture, *one.more_pictures)] == ["a.png", "c.png", "b.png"]
    assert two.more_pictures == ()


def test_a_mask_lies_beside_its_picture(write: Write, tmp_path: Path) -> None:
    path = write("sku,image,mask,Maske\nA1,a.png,m.png,n.png\nA2,b.png,,\n")
    one, two = rows(path)
    assert (one.mask, two.mask, one.more_pictures) == (str(tmp_path / "m.png"), None, ())
    assert [row.mask for row in rows(path, mask="Maske")] == [str(tmp_path / "n.png"), None]
    with pytest.raises(InputError, match="no column 'cover' for the mask"):
        read(path, mask="cover")
    assert "scheme ftp" in bad(write("sku,image,mask\nA3,c.png,ftp://x/m.png\n"))[2]


def test_a_mask_that_is_asked_for_is_not_passed_over(write: Write, tmp_path: Path) -> None:
    export = write("Handle,Title,Image Src,Maske\nshirt,Shirt,https://x/a.png,m.png\n")
    assert [row.mask for row in rows(export)] == [None]
    assert [row.mask for row in rows(export, mask="Maske")] == [str(tmp_path / "m.png")]
    with pytest.raises(InputError, match="is a folder, which has no column 'Maske'"):
        read(str(tmp_path), mask="Maske")


def test_json_lines(write: Write, tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": 17, "picture": "a.png", "tags": ["a", "b"], "new": True, "none": None, "box": {"w": 1}}),
        "",
        json.dumps({"id": "B", "picture": ["b.png", "s3://bucket/c.png"]}),
        "[1, 2]",
        "17",
        "null",
        '{"id": "C"',
        json.dumps({"id": "D"}),
        json.dumps({"id": "E", "picture": ""}),
        json.dumps({"id": "F", "picture": "x.png", "title": "\ud800"}),
        json.dumps({"id": "G", "picture": "x.png", "title": "\0"}),
        json.dumps({"id": "H", "picture": {"bytes": "..."}}),
        json.dumps({"id": "I", "picture": [17]}),
        "[" * 100_000,
        json.dumps({"id": "Z", "picture": "z.png"}),
    ]
    path = write("\n".join(lines), "products.jsonl")
    one, two, last = (row for row in read(path) if isinstance(row, Row))
    assert one.id == "17"
    assert one.columns == {"id": "17", "picture": "a.png", "tags": "a, b", "new": "true", "none": "", "box": '{"w": 1}'}
    assert (two.picture, two.more_pictures) == (str(tmp_path / "b.png"), ("s3://bucket/c.png",))
    assert (last.id, last.line) == ("Z", 15)
    found = bad(path)
    assert sorted(found) == list(range(4, 15))
    for line, word in {
        4: "a list; an object",
        5: "a number",
        6: "null",
        7: "no JSON",
        8: "No column holds the picture",
        10: "surrogate",
        12: "dict",
    }.items():
        assert word in found[line]


def test_a_json_array_is_told_what_it_should_be(write: Write) -> None:
    assert "one object a line is wanted" in bad(write('[\n{"id": "A", "picture": "a.png"}\n]', "x.jsonl"))[1]
    with pytest.raises(InputError, match=r"one object a line, and call it \.jsonl"):
        read(write("[]", "x.json"))


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"sku": [1, 2, 3], "image": ["a.png", None, "c.png"], "price": [1.5, None, 2.0], "tags": [["x"], [], ["y", "z"]]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "products.parquet")
    one, two, three = read(str(tmp_path / "products.parquet"))
    assert one == Row(1, "1", str(tmp_path / "a.png"), (), {"sku": "1", "image": "a.png", "price": "1.5", "tags": "x"})
    assert isinstance(two, BadRow)
    assert isinstance(three, Row)
    assert (three.line, three.columns["tags"]) == (3, "y, z")


def test_a_damaged_parquet_file(write: Write) -> None:
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(write(b"PAR1 and then nothing of it", "x.parquet"))


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/a.jpeg", "sub/c.tiff", "notes.txt", ".hidden.png", ".git/x.png", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = read(str(tmp_path))
    assert [row.id for row in found if isinstance(row, Row)] == ["a", "b", "sub/a"]
    assert [row.columns["folder"] for row in found if isinstance(row, Row)] == ["", "", "sub"]
    assert {row.line: row.why for row in found if isinstance(row, BadRow)} == {
        2: "The id 'a' was on line 1 already. Give each row one of its own, or say which column has one.",
        5: "sub/c.tiff is a TIFF picture; JPEG, PNG or WebP is wanted.",
    }
    assert found[0].picture == str(tmp_path / "a.jpg")  # type: ignore[union-attr]


OLD_SHOPIFY = """\
Handle,Title,Vendor,Option1 Name,Option1 Value,Variant SKU,Image Src,Image Position,Image Alt Text,Variant Image
tee,Cotton Tee,Acme,Color,Navy,T-N,https://cdn.shopify.com/t-navy.jpg,1,Navy tee,https://cdn.shopify.com/t-navy.jpg
tee,,,,Red,T-R,https://cdn.shopify.com/t-red.jpg,2,Red tee,https://cdn.shopify.com/t-red.jpg
tee,,,,Green,T-G,,,,https://cdn.shopify.com/t-green.jpg
tee,,,,,,https://cdn.shopify.com/t-back.jpg,4,The back,
bare,No Picture,Acme,Title,Default Title,B,,,,
mug,Mug,Acme,Title,Default Title,M,https://cdn.shopify.com/m.jpg,1,,
,Lost,Acme,,,,https://cdn.shopify.com/l.jpg,1,,
"""


def test_a_shopify_export(write: Write) -> None:
    path = write(OLD_SHOPIFY)
    found = [row for row in read(path) if isinstance(row, Row)]
    assert [(row.id, row.picture.rpartition("/")[2], row.columns["Option1 Value"]) for row in found] == [
        ("tee", "t-navy.jpg", "Navy"),
        ("tee-2", "t-red.jpg", "Red"),
        ("tee-3", "t-green.jpg", "Green"),
        ("tee-4", "t-back.jpg", "Navy"),
        ("mug", "m.jpg", "Default Title"),
    ]
    assert {row.columns["Title"] for row in found[:4]} == {"Cotton Tee"}
    assert [row.line for row in found] == [2, 3, 4, 5, 7]
    assert sorted(bad(path)) == [6, 8]
    assert "'bare' has no picture" in bad(path)[6]


def test_shopifys_newer_header(write: Write) -> None:
    (row,) = rows(
        write(
            "Title,URL handle,Option1 value,Product image URL,Image position,Variant image URL\nTee,tee,Navy,https://x.com/a.jpg,1,\n"
        )
    )
    assert (row.id, row.picture, row.columns["Title"]) == ("tee", "https://x.com/a.jpg", "Tee")


def test_columns_that_are_asked_for_win_over_shopifys(write: Write) -> None:
    found = read(write(OLD_SHOPIFY), id="Variant SKU", picture="Image Src")
    assert [row.id for row in found if isinstance(row, Row)] == ["T-N", "T-R", "M"]


def test_what_is_no_manifest(write: Write, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        read_manifest(str(tmp_path / "none.csv"))
    for name, word in {"x.xlsx": "save it as CSV UTF-8", "x.gz": "Unpack", "x.doc": "Give one of those", "x": "ending ''"}.items():
        with pytest.raises(InputError, match=word):
            read_manifest(write("", name))
    with pytest.raises(InputError, match="at an address"):
        read_manifest("https://example.com/x.csv")


def test_a_hundred_thousand_rows_take_little_memory_and_time(tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    with path.open("w") as file:
        file.write("sku,title,image\n")
        file.writelines(f'SKU-{n},"Shirt, no {n}",https://cdn.example.com/{n}.jpg\n' for n in range(100_000))
    start = time.process_time()
    assert sum(isinstance(row, Row) for row in read_manifest(str(path))) == 100_000
    rows_per_s = 100_000 / (time.process_time() - start)
    assert rows_per_s > 20_000, "some 150,000 on a laptop"
    tracemalloc.start()
    try:
        for _ in read_manifest(str(path)):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8_000_000, "the file has 6 MB, the rows as objects 60"
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=3, max_size=3), max_size=8
    )
)
def test_what_python_writes_comes_back(table: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["a", "b", "c"], *table])
    names, records = read_delimited(TextLines(io.BytesIO(text.getvalue().encode()), "x.csv", None))
    assert names == ("a", "b", "c")
    wanted = [row for row in table if any(row)]
    assert [list(record[1].values()) for record in records if not isinstance(record, BadRow)] == wanted


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_rows_or_bad_rows_or_one_clear_error(data: bytes) -> None:
    try:
        _, records = read_delimited(TextLines(io.BytesIO(data), "x.csv", None))
        lines = [record.line if isinstance(record, BadRow) else record[0] for record in records]
    except InputError:
        return
    assert lines == sorted(lines)


def test_reading_a_manifest_and_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys, millicent.catalog.manifest, millicent.catalog.recipes, millicent.catalog.storage;"
        "print([name for name in ('torch', 'numpy', 'pyarrow', 'fsspec', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
