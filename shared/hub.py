"""The Hugging Face Hub: finished runs pushed to a repository, pulled from one, or named ``hf://owner/name[@revision]``.

A repository holds a run's adapter file, recipe and metrics, and a model card. Only these are ever fetched; tensors come
from safetensors, so nothing is unpickled. ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` hold as
huggingface_hub documents them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import RequestError, WorkError
from shared.store import read_header

ADAPTER, RECIPE, METRICS, CARD = "adapter.safetensors", "recipe.yaml", "metrics.json", "README.md"
FILES = (ADAPTER, RECIPE, METRICS, CARD)


class Address(NamedTuple):
    """A repository, ``owner/name``, and which of its revisions: a branch, tag or commit."""

    repository: str
    revision: str | None

    @classmethod
    def of(cls, text: str) -> Address:
        """From ``owner/name[@revision]``, with ``hf://`` before it or not. Raises RequestError."""
        found = re.fullmatch(r"(?:hf:/{1,2})?([\w.-]+/[\w.-]+)(?:@(.+))?", text)
        if not found:
            raise RequestError(f"{text!r} names no repository: write owner/name or owner/name@revision")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def local(place: str | os.PathLike) -> Path:
    """The folder of a run: ``place`` itself, or that of ``hf://owner/name[@revision]`` in the Hub's cache."""
    text = os.fspath(place)  # a Path writes hf:// with one slash
    return fetch(Address.of(text)) if text.startswith("hf:/") else Path(place)


def local_file(place: str | os.PathLike) -> Path:
    """An adapter file: ``place`` itself, or that of ``hf://owner/name[@revision]`` in the Hub's cache."""
    return local(place) / ADAPTER if os.fspath(place).startswith("hf:/") else Path(place)


def fetch(address: Address) -> Path:
    """The folder in the Hub's cache with the run files of a repository; those that are missing there are fetched.

    Without a network the cache alone answers. Raises RequestError where there is no such repository, revision or
    adapter in it, or no access to it, and WorkError where the Hub cannot be reached or a file arrives damaged.
    """
    hub = _library()
    with _telling(str(address)):
        folder = Path(
            hub.snapshot_download(
                address.repository, revision=address.revision, allow_patterns=list(FILES), endpoint=_endpoint()
            )
        )
    if not (folder / ADAPTER).is_file():
        raise RequestError(f"{address}: the repository holds no {ADAPTER}: it is no run of omniadapt")
    for name in FILES:
        if (folder / name).is_file():
            _check_digest(folder / name, str(address))
    read_header(folder / ADAPTER)
    return folder


def pull(address: Address, folder: Path) -> Path:
    """Copy the run files of a repository to ``folder``, which is made whole or not at all; its absolute path.

    Raises RequestError where the folder is there already and not empty, and as ``fetch``.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is not an empty directory")
    source, folder = fetch(address), folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        os.replace(temporary, folder)
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def push(run: Path, repository: str, *, licence: str, private: bool = False) -> str:
    """Upload a finished run with its model card in one commit, to a repository made if need be; its address.

    licence: of the adapter, as the Hub abbreviates it ("apache-2.0").  private: of a new repository. The recipe goes
    up as it is, with the paths it names.

    Raises RequestError where the run is not whole, no token is set, or the token may not write there, and WorkError
    where the Hub cannot be reached.
    """
    address, files = Address.of(repository), contents(run, repository, licence=licence)
    if address.revision:
        raise RequestError(f"{address}: a push goes to the main branch; name no revision")
    hub = _library()
    if hub.get_token() is None:
        raise RequestError("no token of the Hub: set HF_TOKEN, or log in with: hf auth login")
    with _telling(str(address)):
        api = hub.HfApi(endpoint=_endpoint(), library_name="omniadapt")
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
        commit = api.create_commit(address.repository, operations, commit_message="Run of omniadapt")
    return str(commit.commit_url)


def contents(run: Path, repository: str, *, licence: str) -> dict[str, bytes]:
    """The files of a repository for a finished run, by name: the run's own, byte for byte, and the model card."""
    from shared import recipe
    from shared.card import card

    _library()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise RequestError(f"licence {licence!r}: as the Hub abbreviates it, such as apache-2.0, cc-by-4.0 or other")
    if lacking := next((name for name in (RECIPE, ADAPTER, METRICS) if not (run / name).is_file()), None):
        raise RequestError(f"{run}: no directory of a finished run: it holds no {lacking}")
    header, tree = read_header(run / ADAPTER), recipe.read(run / RECIPE)
    try:
        found = json.loads((run / METRICS).read_bytes())
        text = card(Address.of(repository).repository, licence, header, tree, found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{run}: its metrics or recipe are not those of a run ({error})") from error
    return {name: (run / name).read_bytes() for name in (ADAPTER, RECIPE, METRICS)} | {CARD: text.encode()}


def write(run: Path, repository: str, folder: Path, *, licence: str) -> None:
    """Write what ``push`` would upload to a folder, and upload nothing; ``load`` takes the folder as it does a run."""
    from shared.store import write_atomically

    for name, data in contents(run, repository, licence=licence).items():
        write_atomically(folder / name, data)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise RequestError("the Hub needs huggingface_hub: pip install 'omniadapt[run]'") from error
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _check_digest(path: Path, what: str) -> None:
    """The cache names a file by its hash, SHA-256 or that of a git blob; one that lies is removed and refused."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):  # a cache without links
        return
    size = blob.stat().st_size
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(blob, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != blob.name:
        for link in (blob, path):
            with suppress(OSError):
                link.unlink()
        raise WorkError(f"{what}: {path.name} arrived damaged ({size:,} bytes of another hash); pull it again")


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Within it failures of huggingface_hub become one line each, and its own messages stay away."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (RequestError, WorkError):
        raise
    except Exception as error:
        raise _told(error, what, _endpoint() or "https://huggingface.co") from error
    finally:
        logger.setLevel(before)


def _told(error: Exception, what: str, endpoint: str) -> Exception:
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # "Error while uploading"
        error = error.__cause__
    reason = " ".join(str(error).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return RequestError(f"{what}: no name of a repository: {reason}")
    if isinstance(error, errors.GatedRepoError):
        return RequestError(f"{what}: access must be asked for at {endpoint}, and a token set (HF_TOKEN)")
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{what}: the repository at {endpoint} has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(f"{what}: no such repository at {endpoint}, or a private one (set HF_TOKEN for those)")
    if status in (401, 403):
        return RequestError(
            f"{what}: {endpoint} refuses the token ({status}): it must be valid, with the right to write"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # also where only a part is in the cache
        cause = error.__cause__
        offline = cause is None or isinstance(cause, errors.OfflineModeIsEnabled)
        why = "offline (HF_HUB_OFFLINE)" if offline else f"{endpoint} cannot be reached ({_brief(cause)})"
        return WorkError(f"{what}: {why}, and the cache does not hold it whole")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return WorkError(f"{what}: offline (HF_HUB_OFFLINE): nothing can be uploaded")
    if status is None and type(error).__module__.partition(".")[0].startswith("httpx"):
        return WorkError(f"{what}: {endpoint} cannot be reached, or broke off ({_brief(error)})")
    return WorkError(f"{what}: {_brief(error)}")


def _brief(error: BaseException | None) -> str:
    """The first line of an error, which may run to a page."""
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__
