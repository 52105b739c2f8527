"""The hub: a model's files fetched into its cache, only those that are needed, and its failures in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from calque import checkpoint, unreadable
from calque.companions import CARD, COMPANIONS, CONFIG
from calque.errors import SourceUnreadable

# Small files besides the companions: where the weights lie, what else the repository may be.
EXTRAS = (*(index for _, index in checkpoint.FORMATS), unreadable.ADAPTER)


def fetch_config(model: str, trust_remote_code: bool) -> tuple[str, str, Path]:
    """Return name, commit and folder of ``org/name[@revision]``: its snapshot in the cache, as yet without weights.

    It holds config and companions, so that a model that cannot be converted is refused before its weights are fetched;
    and its Python files, where they are trusted.

    Raises:
        SourceUnreadable: why it could not be fetched, and what to do.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        config = Path(hf_hub_download(name, CONFIG, revision=revision or None))
        # The cache keeps each commit in a folder of its name; from here on all files are of this one commit.
        commit = config.parent.name
        patterns = [*COMPANIONS, *EXTRAS, *(["*.py"] if trust_remote_code else [])]
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
        with contextlib.suppress(LocalEntryNotFoundError):  # offline, a cached model is not refused for want of its card
            snapshot_download(name, revision=commit, allow_patterns=[CARD])
        return name, commit, folder
    except Exception as error:
        raise hub_error(model, error) from error


def fetch_weights(name: str, commit: str, folder: Path) -> None:
    """``folder``, the snapshot, holds the weights of one format: the first of those that a checkpoint is looked up in.

    Raises:
        SourceUnreadable: the repository has none of them, or they could not be fetched.
    """
    from huggingface_hub import snapshot_download

    for single, index in checkpoint.FORMATS:
        try:
            snapshot_download(name, revision=commit, allow_patterns=[single])
            if (folder / single).is_file():
                return
            if (folder / index).is_file():
                snapshot_download(name, revision=commit, allow_patterns=list(checkpoint.weight_files(folder)))
                return
        except Exception as error:
            raise hub_error(f"{name}@{commit}", error) from error
    try:
        names = _file_names(name, commit)
    except Exception as error:
        raise hub_error(f"{name}@{commit}", error) from error
    raise unreadable.no_weights(names, f"{name} on the hub", checkpoint.WANTED)


def hub_error(model: str, error: Exception) -> SourceUnreadable:
    """Return the failure in our words. The hub's client raises its own, its transport's and the system's exceptions."""
    from huggingface_hub import constants, errors, is_offline_mode

    if isinstance(error, SourceUnreadable):
        return error
    name, _, revision = model.partition("@")
    page = f"{constants.ENDPOINT}/{name}"
    status = next((cause.response.status_code for cause in _causes(error) if isinstance(cause, errors.HfHubHTTPError)), None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        fix = f"accept its licence at {page} with your account, then set HF_TOKEN to a token of that account that may read it"
        return SourceUnreadable(f"{model} is gated", fix=fix)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        fix = f"check the spelling at {page}, and set HF_TOKEN if it is private; no folder of that name exists here either"
        return SourceUnreadable(f"{model} is not on the hub, or is private to others than your HF_TOKEN", fix=fix)
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceUnreadable(f"{model}: the hub has no such revision", fix=f"see {page}/commits/main for branches, tags and commits")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return _without_config(name, revision or None)
    if isinstance(error, errors.HFValidationError):
        return SourceUnreadable(f"{model!r} is no hub id: {error}", fix="a hub id is org/name[@revision]")
    if is_offline_mode() and isinstance(error, errors.EntryNotFoundError | errors.OfflineModeIsEnabled):
        fix = "unset HF_HUB_OFFLINE once to fetch it, or set HF_HOME to a cache that has it; no folder of that name exists here either"
        return SourceUnreadable(f"{model} is not all in the local cache, and HF_HUB_OFFLINE forbids fetching it", fix=fix)
    if isinstance(error, OSError) and error.filename:
        fix = "give that place room and yourself the right to write there, or set HF_HOME to another folder; or name a local one"
        return SourceUnreadable(f"{model} could not be stored in the cache: {error.filename}: {error.strerror}", fix=fix)
    *_, first = _causes(error)
    return SourceUnreadable(
        f"{model} could not be fetched from {constants.ENDPOINT}: {type(first).__name__}: {first}",
        fix="check the network and the disk, then run again: what was fetched is kept; or name a local folder",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, what it was raised from, and so on: the client hides a refusal behind a file that is not cached."""
    while error is not None:
        yield error
        error = error.__cause__


def _without_config(name: str, revision: str | None) -> SourceUnreadable:
    try:
        names: Sequence[str] = _file_names(name, revision)
    except Exception:  # what the repository is instead stays unknown; that it has no config is certain
        names = ()
    return unreadable.no_config(names, f"{name} on the hub", CONFIG)


def _file_names(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(name, revision=revision)
