"""--push-to-hub: weights, card and samples in a repository of the user's own."""

import re
from pathlib import Path


def refuse(repository: str, toy: str | None = None) -> None:
    """Raise ValueError or OSError in one line where pushing at the end would fail: no weights for it, no name, no login,
    one that the hub does not take, or no hub."""
    from huggingface_hub import HfApi, get_token

    if toy:
        raise ValueError(f"preset {toy} has nothing for the hub; leave --push-to-hub out")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push-to-hub wants OWNER/NAME, got {repository!r}")
    if not get_token():
        raise ValueError("--push-to-hub: not logged in to the hub; run `hf auth login`, or leave it out")
    try:
        HfApi().whoami()
    except Exception as error:  # the client's own, and those of the libraries below it
        raise OSError(
            f"--push-to-hub: {reason(error)}; run `hf auth login` again, or leave it out and push later"
        ) from error


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def push(repository: str, folder: Path) -> str:
    """Upload the folder, as a private repository where it is new. Returns its address.

    Raises OSError in one line with the command that does it again.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        page = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Fine-tuned weights, card and samples")
    except Exception as error:  # the client's own, and those of the libraries below it
        raise OSError(
            f"cannot push to {repository}: {reason(error)}; all is in {folder}: hf upload {repository} {folder}"
        ) from error
    return str(page)
