"""The gallery: what a page shows, what it never lets run, and that it is found again from a disk."""

from __future__ import annotations

import io
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from millicent.catalog import gallery
from millicent.catalog.gallery import Shown, write_gallery
from millicent.errors import InputNotFoundError, OutputError


def png(color: str, size: tuple[int, int] = (640, 480)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def read_before(location: str) -> bytes:
    if location == "gone.png":
        raise InputNotFoundError("There is no file <gone>.png.", "Check the path.")
    return png("red")


def read_after(name: str) -> bytes:
    return png("navy", (300, 900))


def shown(**changes: object) -> Shown:
    row = {
        "title": "A-1",
        "variant": "navy",
        "before": "shirt.png",
        "after": "A-1/navy.png",
        "prompt": "make it navy",
        "verdict": "done",
        "accepted": True,
        "seed": 7,
        "seconds": 1.5,
        "usd": Decimal("0.0002"),
    }
    return Shown(**(row | changes))  # type: ignore[arg-type]


def write(rows: list[Shown], path: Path, out: Path | str | None = None) -> list[Path]:
    return write_gallery(rows, str(out or path.parent), path, read_before=read_before, read_after=read_after, threads=2)


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for name, attributes in self.tags if name == tag and attribute in attributes]


def test_a_page_shows_both_pictures_and_the_facts(tmp_path: Path) -> None:
    (page,) = write([shown()], tmp_path / "gallery.html")
    tags = Tags(page)
    for fact in ("A-1 · navy", "make it navy", "done", "1.50 s", "seed 7", "$0.00020", "1 attempt"):
        assert fact in tags.text
    before, after = (Image.open(io.BytesIO((tmp_path / unquote(source)).read_bytes())) for source in tags.values("img", "src"))
    assert before.format == after.format == "JPEG"
    assert (before.size, after.size) == ((320, 240), (107, 320))
    assert before.getpixel((5, 5))[0] > 240 > 20 > before.getpixel((5, 5))[2]  # type: ignore[index]


def test_links_lead_from_the_page_to_the_files_from_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "the out #1"
    (out / "A 1%").mkdir(parents=True)
    (out / "A 1%" / "x?.png").write_bytes(png("navy"))
    (page,) = write([shown(after="A 1%/x?.png")], tmp_path / "pages" / "my gallery.html", out)
    (link,) = Tags(page).values("a", "href")
    assert (page.parent / unquote(link)).samefile(out / "A 1%" / "x?.png")
    assert not Path(unquote(link)).is_absolute()
    assert "#" not in link
    assert "?" not in link
    for source in Tags(page).values("img", "src"):
        assert (page.parent / unquote(source)).is_file()


def test_a_result_in_a_store_has_no_link(tmp_path: Path) -> None:
    (page,) = write([shown()], tmp_path / "gallery.html", "s3://bucket/out")
    assert Tags(page).values("a", "href") == []
    assert len(Tags(page).values("img", "src")) == 2


@pytest.mark.parametrize("field", ["title", "variant", "prompt", "verdict", "why", "before", "after"])
def test_no_text_of_a_row_becomes_a_tag(tmp_path: Path, field: str) -> None:
    attack = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt;"
    (page,) = write([shown(**{field: attack})], tmp_path / "gallery.html")
    tags = Tags(page)
    assert "script" not in [tag for tag, _ in tags.tags]
    assert all("onerror" not in attributes for _, attributes in tags.tags)
    assert len([tag for tag, _ in tags.tags if tag == "img"]) == 2
    if field not in ("before", "after"):
        assert attack in tags.text


def test_what_cannot_be_read_or_is_not_there_is_told(tmp_path: Path) -> None:
    row = shown(before="gone.png", after=None, accepted=False, verdict="quarantined", why="static: grain of 49 levels")
    (page,) = write([row], tmp_path / "gallery.html")
    tags = Tags(page)
    assert "There is no file <gone>.png." in tags.text
    assert "quarantined: static: grain of 49 levels" in tags.text
    assert "refused" in tags.values("p", "class")
    assert tags.values("img", "src") == []


def test_a_file_that_is_no_picture_is_told(tmp_path: Path) -> None:
    (page,) = write_gallery([shown()], str(tmp_path), tmp_path / "g.html", read_before=read_before, read_after=lambda _: b"text")
    assert "the picture is not a JPEG, PNG or WebP picture" in Tags(page).text


def test_many_rows_go_on_pages_that_lead_to_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "ROWS_A_PAGE", 2)
    pages = write([shown(title=f"A-{number}", after=None) for number in range(5)], tmp_path / "gallery.html")
    assert [page.name for page in pages] == ["gallery.html", "gallery-2.html", "gallery-3.html"]
    links = [Tags(page).values("a", "href") for page in pages]
    assert [set(page) for page in links] == [{"gallery-2.html"}, {"gallery.html", "gallery-3.html"}, {"gallery-2.html"}]
    assert [sum(f"A-{number}" in Tags(page).text for page in pages) for number in range(5)] == [1] * 5
    assert len(list((tmp_path / "gallery-thumbnails").iterdir())) == 1  # one input, shown five times


def test_full_pages_have_no_empty_one_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "ROWS_A_PAGE", 2)
    assert len(write([shown(), shown()], tmp_path / "gallery.html")) == 1


def test_rows_are_taken_a_page_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "ROWS_A_PAGE", 2)
    taken_at_first_page = []

    def rows() -> object:
        for number in range(9):
            if not taken_at_first_page and (tmp_path / "gallery.html").exists():
                taken_at_first_page.append(number)
            yield shown(title=str(number), after=None)

    write_gallery(rows(), str(tmp_path), tmp_path / "gallery.html", read_before=read_before, read_after=read_after)  # type: ignore[arg-type]
    assert taken_at_first_page == [4]  # its own two, and two to know that it is not the last


def test_no_rows_make_one_page_that_says_so(tmp_path: Path) -> None:
    (page,) = write([], tmp_path / "gallery.html")
    assert "No images." in Tags(page).text


def test_a_path_that_is_no_page_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.png"):
        write([], tmp_path / "gallery.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write([], tmp_path / "file" / "gallery.html")


def test_nothing_but_pages_and_thumbnails_is_left(tmp_path: Path) -> None:
    write([shown()], tmp_path / "gallery.html")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names[0] == "gallery-thumbnails/" + names[0].rpartition("/")[2]
    assert [name.rpartition(".")[2] for name in names] == ["jpg", "jpg", "html"]


def test_half_a_character_from_a_json_manifest_does_not_stop_a_page(tmp_path: Path) -> None:
    (page,) = write([shown(prompt="make it \ud83d navy")], tmp_path / "gallery.html")
    assert "navy" in Tags(page).text
