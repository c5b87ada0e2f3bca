"""A gallery of before and after: plain HTML pages with small pictures beside them, which open from a disk without a server."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from millicent.catalog.rows import scheme_of
from millicent.errors import MillicentError, OutputError
from millicent.images import flatten, open_image

ROWS_A_PAGE = 200
THUMBNAIL_PX = 320
QUALITY = 82
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#222;background:#fff}
article{display:flex;gap:1rem;border-top:1px solid #ddd;padding:1rem 0;align-items:flex-start}
figure{margin:0;width:20rem;flex:none}figcaption{color:#666;font-size:.85em}
img{max-width:100%;display:block;background:#f4f4f4}.none{color:#666;padding:3rem 1rem;background:#f4f4f4}
h2{font-size:1.05em;margin:0}p{margin:.3rem 0;overflow-wrap:anywhere}.refused{color:#a11}.accepted{color:#175}
nav{margin:1rem 0}nav a{margin-right:1rem}
"""

ReadBytes = Callable[[str], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One image of the gallery.

    before: where the input lies, as the manifest says. after: the output's name under the output root; None where there is none.
    verdict: as "done" or "quarantined". why: for what is not accepted. seconds and usd: of all its attempts.
    """

    title: str
    variant: str
    before: str
    after: str | None
    prompt: str
    verdict: str
    accepted: bool
    seed: int | None = None
    attempts: int = 1
    seconds: float = 0.0
    usd: Decimal | None = None
    why: str = ""


def write_gallery(
    rows: Iterable[Shown],
    out_root: str,
    path: Path,
    *,
    read_before: ReadBytes,
    read_after: ReadBytes,
    heading: str = "Before and after",
    threads: int | None = None,
) -> list[Path]:
    """Write `path` (.html) and, for every further 200 rows, path-2, path-3 and so on; -> the pages.

    Thumbnails go into the folder path-thumbnails. Rows are read a page at a time. A picture that cannot be read is told in its
    place.
    out_root: the output root; results under a local one are linked. read_before, read_after: bytes by location, and by output name.
    threads: that open pictures; None: as many as there are cores. Raises OutputError.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{path} has the ending {path.suffix!r}.", "Use .html.")
    folder = path.with_name(f"{path.stem}-thumbnails")
    pages: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for number, chunk, is_last in _paginate(rows):
                page = page_path(path, number)
                jobs = list(dict.fromkeys(job for row in chunk for job in _jobs(row, read_before, read_after)))
                drawn = dict(zip(jobs, pool.map(lambda job: _draw_thumbnail(job, folder), jobs), strict=True))
                articles = [
                    _article(row, drawn, folder.name, _link(row, out_root, page), (read_before, read_after)) for row in chunk
                ]
                _write(page, _page(heading, articles, path, number, is_last).encode(errors="xmlcharrefreplace"))
                pages.append(page)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", "Choose another place, or make room there.") from error
    return pages


def page_path(path: Path, number: int) -> Path:
    """gallery.html, gallery-2.html and so on."""
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def _paginate(rows: Iterable[Shown]) -> Iterator[tuple[int, Sequence[Shown], bool]]:
    """Number, rows, and whether it is the last page; one page, if an empty one, at least."""
    iterator = iter(rows)
    chunk = list(itertools.islice(iterator, ROWS_A_PAGE))
    for number in itertools.count(1):
        following = list(itertools.islice(iterator, ROWS_A_PAGE))
        yield number, chunk, not following
        if not following:
            return
        chunk = following


Job = tuple[ReadBytes, str]


def _jobs(row: Shown, read_before: ReadBytes, read_after: ReadBytes) -> Iterator[Job]:
    yield read_before, row.before
    if row.after is not None:
        yield read_after, row.after


@dataclass(frozen=True, slots=True)
class _Thumbnail:
    """A file's name, and its size in pixels; or why there is none."""

    name: str = ""
    size: tuple[int, int] = (0, 0)
    why: str = ""


def _draw_thumbnail(job: Job, folder: Path) -> _Thumbnail:
    read, location = job
    try:
        picture = flatten(open_image(read(location), name="the picture"))
    except MillicentError as error:
        return _Thumbnail(why=error.message)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    # named by its content: variants of one row share their input, and a second gallery leaves no page with another's picture
    name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:24]}.jpg"
    if not (folder / name).is_file():
        _write(folder / name, buffer.getvalue())
    return _Thumbnail(name, picture.size)


def _write(path: Path, data: bytes) -> None:
    """Beside, then renamed. Not forced to the disk: a gallery can be made again."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _link(row: Shown, out_root: str, page: Path) -> str | None:
    """From the page to the result in full size, where that is a file."""
    if row.after is None or scheme_of(out_root):
        return None
    return quote(Path(os.path.relpath(Path(out_root).resolve() / row.after, page.parent.resolve())).as_posix())


def _article(row: Shown, drawn: dict[Job, _Thumbnail], folder: str, link: str | None, reads: tuple[ReadBytes, ReadBytes]) -> str:
    before = _figure("before", drawn[reads[0], row.before], folder, None)
    after = _figure("after", _Thumbnail(why="none") if row.after is None else drawn[reads[1], row.after], folder, link)
    facts = [f"{row.attempts} attempt{'' if row.attempts == 1 else 's'}", f"{row.seconds:.2f} s"]
    facts += [] if row.seed is None else [f"seed {row.seed}"]
    facts += [] if row.usd is None else [f"${row.usd:.5f}"]
    mark = "accepted" if row.accepted else "refused"
    why = f": {escape(row.why)}" if row.why else ""
    return (
        f"<article>\n{before}\n{after}\n<div><h2>{escape(row.title)} &middot; {escape(row.variant)}</h2>\n"
        f'<p>{escape(row.prompt)}</p>\n<p class="{mark}">{escape(row.verdict)}{why}</p>\n'
        f"<p>{', '.join(facts)}</p></div>\n</article>"
    )


def _figure(caption: str, thumbnail: _Thumbnail, folder: str, link: str | None) -> str:
    if not thumbnail.name:
        return f'<figure><div class="none">{escape(thumbnail.why)}</div><figcaption>{caption}</figcaption></figure>'
    width, height = thumbnail.size
    source = quote(f"{folder}/{thumbnail.name}")
    image = f'<img src="{source}" alt="{caption}" width="{width}" height="{height}" loading="lazy">'
    image = image if link is None else f'<a href="{escape(link)}">{image}</a>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _page(heading: str, articles: Sequence[str], path: Path, number: int, is_last: bool) -> str:
    links = [] if number == 1 else [f'<a href="{quote(page_path(path, number - 1).name)}">previous</a>']
    links += [] if is_last else [f'<a href="{quote(page_path(path, number + 1).name)}">next</a>']
    nav = f"<nav>Page {number} {' '.join(links)}</nav>" if links else ""
    body = "\n".join(articles) or "<p>No images.</p>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        # every text in here came from a manifest: nothing of it may run
        '<meta http-equiv="Content-Security-Policy" content="script-src \'none\'">\n'
        f"<title>{escape(heading)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(heading)}</h1>\n"
        f"{nav}\n{body}\n{nav}\n</body>\n</html>\n"
    )
