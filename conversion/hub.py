"""The Hugging Face Hub: downloads a checkpoint, uploads a converted folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConversionError


_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# Nothing that could be run is even downloaded.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"]
_WANTED += ["sentencepiece.bpe.model", "spm.model"]
_CARD = "README.md"
_INDEX = "model.safetensors.index.json"
# A row of the table of files in a card that `conversion.card` wrote, where it names weights.
_LISTED = re.compile(
    r"^\| (model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?) \| `[0-9a-f]{64}` \|$", re.MULTILINE
)
_CARD_BYTES = 2**20


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
            f"{source} is not a folder here, and the Hub did not provide it ({_first_line(error)}): check the name; "
            f"without a network, run `hf download {name}` on a machine that has one, and pass the folder"
        ) from None
    return Path(folder), str(source)


@dataclass(frozen=True)
class Published:
    """What `publish` did: the commit's address, and the weight files of an earlier push that it deleted."""

    commit_url: str
    deleted: list[str]


def publish(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> Published:
    """Uploads a converted folder in one commit, and creates the repository and the branch if they are missing.

    Weight files that the card of an earlier push lists, and that this folder does not have, are deleted in the same
    commit, since they would be loaded beside or in place of these. Nothing else in the repository is deleted.

    Args:
        folder: the converted folder.
        repo_id: `user/name`.
        private: whether a repository that is created here is private.
        revision: the branch; None is the main one.

    Raises:
        ConversionError: the Hub refused or cannot be reached, or holds weights that would be loaded in place of these
            and that no push of a converted folder listed. The folder stays.
    """
    check_repo_id(repo_id)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # An existing repository keeps its own visibility.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        new = {path.name for path in folder.iterdir()}
        listed = _listed_weights(api.hf_hub_download(repo_id, _CARD, revision=revision)) if _CARD in there else set()
        stale = sorted((listed & there) - new)
        if _INDEX in new and "model.safetensors" in there - new - set(stale):
            raise ConversionError(
                f"--push-to-hub {repo_id}: it holds a model.safetensors that no push of a converted folder listed, "
                "and that would be loaded in place of the new shards: delete it there, or choose another repository"
            )
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            revision=revision,
            commit_message="Upload a converted HRM-Text",
            delete_patterns=stale or None,
        )
    except ConversionError:
        raise
    except Exception as error:  # as in `locate`
        raise ConversionError(
            f"--push-to-hub {repo_id}: the Hub refused ({_first_line(error)}); check `hf auth login` and the network. "
            f"{folder} is complete: `hf upload {repo_id} {folder}` sends it later"
        ) from None
    return Published(commit.commit_url, stale)


def _listed_weights(card: str) -> set[str]:
    """The weight files that a model card lists with their digests."""
    with open(card, encoding="utf-8", errors="replace") as file:
        return set(_LISTED.findall(file.read(_CARD_BYTES)))


def check_repo_id(repo_id: str) -> None:
    """Raises a ConversionError unless `repo_id` reads user/name."""
    match = _HUB_ID.fullmatch(repo_id)
    if match is None or match["revision"]:
        raise ConversionError(f"--push-to-hub {repo_id!r} is not a repository name: write USER/NAME")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
