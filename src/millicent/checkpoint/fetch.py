"""Fetching a model from a hub, so that nothing is paid for twice and nothing arrives that cannot be used.

Before the first byte of weights: the license is looked at, what is here already is hashed, the free disk is measured against
the real sizes, and the header of every weight file is read by ranges. After it: size and hash of each file. What came is
written down beside it, in millicent-source.json.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from millicent.checkpoint.architecture import Part
from millicent.checkpoint.files import join
from millicent.checkpoint.folder import show_some
from millicent.checkpoint.hub import Hub, RemoteFile, Repository, download, list_repository
from millicent.checkpoint.recognize import recognize_files
from millicent.checkpoint.source import open_source
from millicent.errors import CheckpointError, InputError, MachineError, ModelNotFoundError, OutputError
from millicent.facts.licenses import allows_commercial_use
from millicent.facts.models import Card, LoraCard, ModelCard, TransformerCard, find_any_card, list_cards

RECORD = "millicent-source.json"
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl")  # the last five to be refused by their header
SAFE_WEIGHTS = (".safetensors", ".gguf")
# a repository in diffusers' layout, without the weights in other formats that may lie beside it
WHOLE_MODEL = ("model_index.json", "LICENSE*", "*/*.json", "*/*.txt", "*/*.jinja", "*/*.safetensors")
MAX_CONFIG_BYTES = 1 << 20
ROOM = 1.1  # times the bytes that are to come: other programs write to the same disk meanwhile
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")

Stage = Literal["check", "inspect", "fetch"]


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """Before a stage turns to `file`, and in "fetch" as its bytes come. done_bytes, total_bytes: over all files."""

    stage: Stage
    file: str
    done_bytes: int
    total_bytes: int


OnFetch = Callable[[FetchProgress], None]


@dataclass(frozen=True, slots=True)
class Listing:
    """What would be fetched. revision: as asked for. license: the hub's word, else the card's; None where neither has one.

    commercial: whether the license allows commercial use, None where its name does not tell.
    """

    name: str
    repository: Repository
    revision: str | None
    card: Card | None
    license: str | None
    commercial: bool | None
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Fetched:
    """sha256: of each file by its path. fetched: those that were not here before."""

    folder: Path
    sha256: Mapping[str, str]
    fetched: tuple[str, ...]
    fetched_bytes: int


def list_model(model: str, files: Sequence[str] = (), revision: str | None = None, hub: Hub | None = None) -> Listing:
    """Ask a hub for the files of a card's name, or of a repository as owner/name.

    files: paths or patterns in a repository; none for a whole diffusers-layout model, or where it has one weight file alone.
    revision: a branch, tag or commit; else the card's, else the main branch. hub: the public one, without a token.
    Raises ModelNotFoundError, InputError for files that do not say enough, CheckpointError as `list_repository`.
    """
    card = None if "/" in model else _find_card(model)
    if card is not None and files:
        raise InputError(f"The card {model} says which files it needs.", f"Leave them out, or name the repository {card.repo}.")
    revision = revision or (card.revision if card else None)
    repository = list_repository(hub or Hub(), str(card.repo) if card else model, revision)
    chosen = _choose(repository, (card.files or WHOLE_MODEL) if card else files)
    license_name = repository.license or (card.license if card else None)
    name = model.replace("/", "--")
    return Listing(name, repository, revision, card, license_name, allows_commercial_use(license_name), chosen)


def _find_card(name: str) -> Card:
    if name not in list_cards():
        names = ", ".join(list_cards())
        raise ModelNotFoundError(f"There is no card named {name!r}.", f"Use a repository as owner/name, or one of {names}.")
    return find_any_card(name)


def _choose(repository: Repository, patterns: Sequence[str]) -> tuple[RemoteFile, ...]:
    paths = sorted(file.path for file in repository.files)
    weights = [path for path in paths if path.endswith(SAFE_WEIGHTS)]
    if not weights:
        raise CheckpointError(f"{repository.name} holds no safetensors and no GGUF file.", "Use another repository.")
    if not patterns and "model_index.json" not in paths and len(weights) > 1:
        raise InputError(f"{repository.name} holds {len(weights)} weight files.", f"Name those to fetch: {show_some(weights)}.")
    if not patterns:
        patterns = WHOLE_MODEL if "model_index.json" in paths else weights
    chosen: set[str] = set()
    for pattern in patterns:
        # looked up first: a name may hold what means something in a pattern
        matching = [pattern] if pattern in paths else fnmatch.filter(paths, pattern)
        if not matching and pattern not in WHOLE_MODEL[1:]:
            raise InputError(f"{repository.name} has no file {pattern}.", f"It has {show_some(paths)}.")
        chosen.update(matching)
    if RECORD in chosen:
        raise CheckpointError(f"{repository.name} holds a {RECORD}, where we write down what came.", "Use another repository.")
    return tuple(file for file in sorted(repository.files, key=lambda file: file.path) if file.path in chosen)


def fetch(
    listing: Listing, folder: Path, hub: Hub | None = None, accept_license: bool = False, on_progress: OnFetch | None = None
) -> Fetched:
    """Bring a listing's files into `folder`, under their paths in the repository.

    What is there already and has the right hash stays. What a broken or killed run left is taken up again.
    Raises InputError for a license that is not accepted, MachineError for too little disk, OutputError for a file of another
    content in the way, CheckpointError for weights that no model here could use, and for bytes that are not those listed.
    """
    hub, tell = hub or Hub(), on_progress or (lambda progress: None)
    if listing.commercial is False and not accept_license:
        raise InputError(
            f"{listing.repository.name} is under the license {listing.license}, which allows no commercial use.",
            "Read it, and pass --accept-license if your use is another.",
        )
    record = _read_record(folder)
    missing = _find_missing(listing, folder, record, tell)
    _check_room(missing, folder)
    _inspect(listing, missing, hub, tell)
    came = _Count(sum(file.size_bytes for file in missing), tell)
    for file in missing:
        _fetch_one(listing.repository, file, folder, hub, came)
    sha256 = {file.path: file.sha256 or _sha256(folder / file.path) for file in listing.files}
    _write_record(folder, record, listing, sha256, accept_license)
    return Fetched(folder, sha256, tuple(file.path for file in missing), came.fetched_bytes)


def _find_missing(listing: Listing, folder: Path, record: Sequence[Mapping[str, Any]], tell: OnFetch) -> list[RemoteFile]:
    """The files that are not here, or here as another revision that we fetched ourselves."""
    ours = {path: file["sha256"] for source in record for path, file in source["files"].items()}
    missing, done = [], 0
    for file in listing.files:
        path = folder / file.path
        tell(FetchProgress("check", file.path, done, listing.size_bytes))
        done += file.size_bytes
        if path.is_file() and file.matches(path):
            continue
        if path.exists() and not (path.is_file() and ours.get(file.path) == _sha256(path)):
            raise OutputError(
                f"{path} is there already and differs from the file that {listing.repository.name} has.",
                "Move it away, or choose another folder with --to.",
            )
        missing.append(file)
    return missing


def _check_room(missing: Sequence[RemoteFile], folder: Path) -> None:
    here = sum(min(part.stat().st_size, file.size_bytes) for file in missing if (part := _part(folder, file)).is_file())
    needed = int((sum(file.size_bytes for file in missing) - here) * ROOM)
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(standing).free
    if needed > free:
        raise MachineError(
            f"{needed / 1e9:.2f} GB are wanted, a margin of {ROOM - 1:.0%} included, and {standing} has {free / 1e9:.2f} GB free.",
            "Make room, or choose a folder on another disk with --to.",
        )


def _inspect(listing: Listing, missing: Sequence[RemoteFile], hub: Hub, tell: OnFetch) -> None:
    """Read the headers of the weight files that are to come, shards of one set together."""
    wanted = {file.path for file in missing}
    for files in _weight_sets(listing.files):
        if wanted.isdisjoint(file.path for file in files):
            continue
        tell(FetchProgress("inspect", files[0].path, 0, 0))
        repository = listing.repository
        urls = [hub.address(repository.name, repository.commit, file.path) for file in files]
        part, sizes = inspect_before(urls, hub.token, _config_beside(listing, files[0].path, hub))
        for file, size_bytes in zip(files, sizes, strict=True):
            if size_bytes != file.size_bytes:
                raise CheckpointError(
                    f"The hub lists {file.path} with {file.size_bytes} bytes, and its server has {size_bytes}.", "Try again later."
                )
        if (expected := _expected_parts(listing, files[0].path)) and part not in expected:
            raise CheckpointError(
                f"{files[0].path} in {repository.name} holds a {part}; a {expected[0]} is wanted there.", "Use another file."
            )


def inspect_before(urls: Sequence[str], token: str | None, config: Mapping[str, Any] | None = None) -> tuple[Part, tuple[int, ...]]:
    """What one weight file, or all shards of one set, hold, told from their headers; and each file's size in bytes.

    token: goes to the server of the URLs alone. config: the config.json that lies beside them.
    Raises CheckpointError and its kinds for whatever this version would not load.
    """
    sources = [open_source(url, token) for url in urls]
    files = join(sources[0].name, sources, config or {})
    # where several readings fit, the base model decides at loading: no reason to refuse here
    recognized = recognize_files(files, decide=lambda layer, tensors, readings: readings[0])
    return recognized.part, tuple(source.size_bytes for source in sources)


def _config_beside(listing: Listing, path: str, hub: Hub) -> dict[str, Any]:
    """The config.json in a weight file's folder, {} where there is none: it may name the maker of the format."""
    name = str(PurePosixPath(path).with_name("config.json"))
    if all(file.path != name for file in listing.files):
        return {}
    source = open_source(hub.address(listing.repository.name, listing.repository.commit, name), hub.token)
    try:
        config = json.loads(source.read(0, min(source.size_bytes, MAX_CONFIG_BYTES)))
    except ValueError as error:
        raise CheckpointError(f"{source.name} is no JSON: {error}.", "Use another repository.") from error
    return config if isinstance(config, dict) else {}


def _weight_sets(files: Sequence[RemoteFile]) -> list[list[RemoteFile]]:
    """Single weight files, and the shards that belong together. Raises CheckpointError where a shard is left out."""
    sets: dict[tuple[str, ...], list[RemoteFile]] = {}
    for file in files:
        if not file.path.endswith(WEIGHTS):
            continue
        shard = _SHARD.fullmatch(file.path)
        sets.setdefault((shard[1], shard[3], shard[4]) if shard else (file.path,), []).append(file)
    for key, members in sets.items():
        if len(key) > 1 and len(members) != int(key[1]):
            raise CheckpointError(
                f"{members[0].path} is a shard, and {len(members)} of {int(key[1])} are chosen.", f"Name all, as in '{key[0]}*'."
            )
    return list(sets.values())


def _expected_parts(listing: Listing, path: str) -> tuple[Part, ...]:
    """What a file must hold, told by the card or by its folder in a whole model; nothing where neither tells."""
    if isinstance(listing.card, LoraCard):
        return ("lora",)
    if isinstance(listing.card, TransformerCard):
        return ("transformer", "all-in-one")
    if isinstance(listing.card, ModelCard) or any(file.path == "model_index.json" for file in listing.files):
        folders: dict[str, tuple[Part, ...]] = {
            "transformer": ("transformer",),
            "text_encoder": ("text_encoder",),
            "vae": ("vae",),
        }
        return folders.get(path.partition("/")[0], ())
    return ()


class _Count:
    """Adds up what comes, over all files."""

    def __init__(self, total_bytes: int, tell: OnFetch) -> None:
        self.fetched_bytes, self._done_bytes, self._total_bytes, self._tell = 0, 0, total_bytes, tell

    def start(self, file: RemoteFile, here_bytes: int) -> Callable[[int], None]:
        """`here_bytes` of the file are here already. Returns what to call with the others."""
        self._done_bytes += here_bytes
        self._tell(FetchProgress("fetch", file.path, self._done_bytes, self._total_bytes))

        def on_bytes(count: int) -> None:
            self.fetched_bytes += max(count, 0)
            self._done_bytes += count
            self._tell(FetchProgress("fetch", file.path, self._done_bytes, self._total_bytes))

        return on_bytes


def _part(folder: Path, file: RemoteFile) -> Path:
    """Where a file grows. Its hash is in the name: what another revision left is never taken up."""
    path = folder / file.path
    return path.with_name(f"{path.name}.{file.digest[:12]}.part")


def _fetch_one(repository: Repository, file: RemoteFile, folder: Path, hub: Hub, came: _Count) -> None:
    part, path = _part(folder, file), folder / file.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        here = min(part.stat().st_size, file.size_bytes) if part.exists() else 0
        part.touch()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", "Choose another folder with --to.") from error
    download(hub, repository, file, part, came.start(file, here))
    if not file.matches(part):
        part.unlink()
        raise CheckpointError(
            f"{file.path} came with other bytes than {repository.name} lists: its hash is not {file.digest[:12]}….",
            "It was deleted; fetch it again, from another network or hub if it stays so.",
        )
    part.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_record(folder: Path) -> list[dict[str, Any]]:
    """The sources that the folder's record names, none where there is no record."""
    path = folder / RECORD
    if not path.exists():
        return []
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
        known = all(isinstance(source[key], str) for source in sources for key in ("repo", "commit"))
        known = known and all(isinstance(file["sha256"], str) for source in sources for file in source["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise OutputError(f"{path} is no record of what was fetched.", "Move it away, or choose another folder with --to.")
    return list(sources)


def _write_record(
    folder: Path, record: Sequence[dict[str, Any]], listing: Listing, sha256: Mapping[str, str], accepted: bool
) -> None:
    """What came from where. Files of one commit stand together; a path stands with the commit that it came from last."""
    repository = listing.repository
    entry: dict[str, Any] = {
        "repo": repository.name,
        "revision": listing.revision,
        "commit": repository.commit,
        "license": listing.license,
        "commercial_use": listing.commercial,
        "license_accepted": accepted,
        "files": {file.path: {"size_bytes": file.size_bytes, "sha256": sha256[file.path]} for file in listing.files},
    }
    others = []
    for source in record:
        files = {path: file for path, file in source["files"].items() if path not in entry["files"]}
        if (source["repo"], source["commit"]) == (repository.name, repository.commit):
            entry["files"] = dict(sorted((files | entry["files"]).items()))
        elif files:
            others.append({**source, "files": files})
    path = folder / RECORD
    part = path.with_name(f"{RECORD}.part")
    try:
        part.write_text(json.dumps({"sources": [*others, entry]}, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", "Make room, then run the same command again.") from error
