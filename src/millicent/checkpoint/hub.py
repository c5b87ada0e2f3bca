"""A Hugging Face hub: which files a repository holds, and their bytes. The one home of huggingface_hub.

Files come over plain HTTP through `http_get`, not through `hf_hub_download`: since version 2 that one writes to a temporary
file of a random name and deletes it when anything goes wrong, so that a run that is killed begins again at 0, of 40 GB.
`http_get` continues a file that we keep. Xet, which splits files into chunks of its own, is not asked for either: it cannot
continue one, and the hub serves all that it stores at the same address as ranges of plain bytes, up to 50 GB a file.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from millicent.errors import CheckpointError, MachineError, MillicentError, ModelNotFoundError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

TIMEOUT_S = 20.0
PUBLIC_HUB = "https://huggingface.co"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Hub:
    """endpoint: where it answers. token: what it knows its user by; goes to the endpoint alone, None for a stranger."""

    endpoint: str = PUBLIC_HUB
    token: str | None = None

    def address(self, repo: str, commit: str, path: str) -> str:
        """Where one file's bytes are, as they were at a commit."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository. sha256: of a file in LFS; git_sha1: of any other, over git's header and its bytes."""

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None

    @property
    def digest(self) -> str:
        return self.sha256 or self.git_sha1 or ""

    def matches(self, path: Path) -> bool:
        """Whether the file here has the bytes that the hub lists. Reads all of them where the size is right."""
        if path.stat().st_size != self.size_bytes:
            return False
        hasher = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hasher).hexdigest() == self.digest


@dataclass(frozen=True, slots=True)
class Repository:
    """commit: what its revision stood for when it was asked. license: as its owner declares it, None for nothing."""

    name: str
    commit: str
    license: str | None
    files: tuple[RemoteFile, ...]


def list_repository(hub: Hub, name: str, revision: str | None = None) -> Repository:
    """A repository's files with sizes and hashes. `revision`: a branch, tag or commit, None for the main branch.

    Raises ModelNotFoundError where there is none, CheckpointError where it wants a login or its listing cannot be trusted.
    """
    from huggingface_hub import HfApi

    if not _REPO.fullmatch(name):
        raise ModelNotFoundError(f"{name!r} is no name of a repository.", "Write owner/name.")
    with _errors(hub, name):
        # without a token False, as None would have the library look for one in the environment and the home folder
        info = HfApi(endpoint=hub.endpoint, token=hub.token or False).model_info(
            name, revision=revision, files_metadata=True, timeout=TIMEOUT_S
        )
    if info.sha is None or not _SHA1.fullmatch(info.sha):
        raise _unusable(name, f"the commit {info.sha!r}")
    card = info.card_data
    declared = None if card is None else (card.license_name if card.license == "other" else None) or card.license
    files = tuple(_read_file(name, sibling) for sibling in info.siblings or ())
    return Repository(name, info.sha, str(declared) if declared else None, files)


def _read_file(repo: str, listed: RepoSibling) -> RemoteFile:
    path, lfs = listed.rfilename, listed.lfs
    parts = PurePosixPath(path).parts
    if not parts or "\\" in path or "\0" in path or path != "/".join(parts) or parts[0] == "/" or ".." in parts:
        raise _unusable(repo, f"a file named {path!r}")
    size_bytes = listed.size if lfs is None else lfs.size
    sha256, git_sha1 = (None, listed.blob_id) if lfs is None else (lfs.sha256, None)
    # the type is what the library promises, not what a server sends
    if type(size_bytes) is not int or size_bytes < 0:
        raise _unusable(repo, f"{path} with the size {size_bytes!r}")
    if not (_SHA256.fullmatch(sha256 or "") or _SHA1.fullmatch(git_sha1 or "")):
        raise _unusable(repo, f"{path} without a hash to check it by")
    return RemoteFile(path, size_bytes, sha256, git_sha1)


def _unusable(repo: str, what: str) -> CheckpointError:
    return CheckpointError(f"The hub lists {what} in {repo}.", "Ask another hub, or use another repository.")


def download(hub: Hub, repo: Repository, file: RemoteFile, part: Path, on_bytes: Callable[[int], None]) -> None:
    """Fetch one file into `part`, going on where `part` ends. A connection that breaks is taken up again a few times.

    on_bytes: called with each number of bytes that came, less than 0 for those that come again.
    Raises CheckpointError where the network or the hub gives up: `part` then keeps what came. Where more or fewer bytes come
    than the hub lists, `part` is deleted.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    if file.size_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
        raise CheckpointError(
            f"{file.path} has {file.size_bytes / 1e9:.1f} GB, and the hub serves 50 GB a file over HTTP.", "Use smaller shards."
        )
    if part.exists() and part.stat().st_size > file.size_bytes:
        part.unlink()
    # compressed, a text file would have another length than the one that is listed
    headers = build_hf_headers(token=hub.token or False, headers={"Accept-Encoding": "identity"})
    with _errors(hub, repo.name, part), part.open("ab") as out:
        http_get(
            hub.address(repo.name, repo.commit, file.path),  # asked anew at each attempt: where it redirects to expires
            out,
            resume_size=out.tell(),
            headers=headers,
            expected_size=file.size_bytes,
            displayed_filename=file.path,
            tqdm_class=_counter(on_bytes),
        )


def _counter(on_bytes: Callable[[int], None]) -> Any:
    """What http_get takes for a progress bar."""

    class Counter:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            on_bytes(count)

    return Counter


@contextmanager
def _errors(hub: Hub, repo: str, part: Path | None = None) -> Iterator[None]:
    """What the library raises, as one of ours. `part`: the file that was being written."""
    import httpx2  # what huggingface_hub sends its requests with, and whose errors it lets through
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except MillicentError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: its owner wants its terms accepted first.",
            f"Accept them at {hub.endpoint}/{repo}, then set HF_TOKEN.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"There is no repository {repo} at {hub.endpoint}, or it is private.", "Check the name, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo} has no such revision.", "Give a branch, a tag or a commit that it has.") from error
    except HfHubHTTPError as error:
        raise _refusal(hub, repo, error, part) from error
    except httpx2.HTTPError as error:
        kept = "Run the same command again to go on from here." if part else "Check the address and the network."
        raise CheckpointError(f"{hub.endpoint} broke off: {error or type(error).__name__}.", kept) from error
    except OSError as error:
        raise _local_error(repo, error, part) from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo!r} is no name of a repository.", "Write owner/name.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{hub.endpoint} does not answer as a hub does ({error}).", "Check HF_ENDPOINT.") from error


def _refusal(hub: Hub, repo: str, error: HfHubHTTPError, part: Path | None) -> CheckpointError:
    status = cast("Any", error).response.status_code
    if status in (401, 403):
        return CheckpointError(f"{repo} wants a login (status {status}).", "Set HF_TOKEN to a token that may read it.")
    if status == 416 and part is not None:
        part.unlink(missing_ok=True)
        return CheckpointError(f"The server has fewer bytes of {repo} than the hub lists.", "What came was deleted; try again.")
    return CheckpointError(f"{hub.endpoint} answers with status {status} for {repo}.", "Try again later.")


def _local_error(repo: str, error: OSError, part: Path | None) -> MillicentError:
    if error.errno == errno.ENOSPC:
        return MachineError("The disk is full.", "Make room, then run the same command again to go on from here.")
    if type(error) is not OSError or error.errno is not None or part is None:
        return CheckpointError(f"{repo} cannot be fetched: {error}.", "Check the folder and the network.")
    # http_get's own check, the one error without a number: the server ended in good order, but with another length
    size_bytes = part.stat().st_size
    part.unlink()
    return CheckpointError(
        f"A file of {repo} came with {size_bytes} bytes, which is not what the hub lists.", "It was deleted; try again later."
    )
