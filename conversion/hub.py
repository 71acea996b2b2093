"""The Hugging Face Hub: a checkpoint from it, a converted folder to it."""

import re
from pathlib import Path

from .errors import ConversionError


_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# Nothing that could be run is even downloaded.
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def locate(source: str | Path) -> tuple[Path, str]:
    """The folder of a source, downloaded first where it is a Hub id, and the name that the model card gives it.

    Raises:
        ConversionError: it is neither a folder nor a Hub id that can be downloaded.
    """
    path = Path(source).expanduser()
    match = _HUB_ID.fullmatch(str(source))
    if path.exists() or match is None:
        return path, path.resolve().name
    from huggingface_hub import snapshot_download

    name = match["id"]
    try:
        folder = snapshot_download(name, revision=match["revision"], allow_patterns=_WANTED)
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        raise ConversionError(
            f"{source} is no folder here, and the Hub did not give it ({_first_line(error)}): check the name, or, "
            f"without a network, run `hf download {name}` where there is one and pass the folder"
        ) from None
    return Path(folder), str(source)


def publish(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads a converted folder in one commit, making the repository and the branch where they are missing.

    Args:
        folder: the converted folder.
        repo_id: `user/name`.
        private: whether a repository that is made here is private.
        revision: the branch; None is the main one.

    Returns:
        The commit's address.

    Raises:
        ConversionError: the Hub refused, or cannot be reached. The folder stays.
    """
    check_repo_id(repo_id)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # An existing repository keeps its own visibility.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            revision=revision,
            commit_message="Upload a converted HRM-Text",
            # Of an earlier upload, other weight files than these would be loaded in their place.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:  # as in `locate`
        raise ConversionError(
            f"--push-to-hub {repo_id}: the Hub refused ({_first_line(error)}); check `hf auth login` and the network. "
            f"{folder} is complete: `hf upload {repo_id} {folder}` sends it later"
        ) from None
    return commit.commit_url


def check_repo_id(repo_id: str) -> None:
    """Raises a ConversionError unless `repo_id` reads user/name."""
    match = _HUB_ID.fullmatch(repo_id)
    if match is None or match["revision"]:
        raise ConversionError(f"--push-to-hub {repo_id!r} is no repository: write USER/NAME")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
