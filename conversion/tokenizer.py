"""Tokenizer files: found beside a checkpoint, and written so that they load as this project's class."""

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .paths import inside


MODULE = "tokenization_hrm_text.py"
TEMPLATE = "chat_template.jinja"
# How this project's class is named and set up, taken over from the project's own tokenizer_config.json.
_OWN_SETTINGS = (
    "auto_map",
    "clean_up_tokenization_spaces",
    "default_condition",
    "model_input_names",
    "padding_side",
    "tokenizer_class",
)


def find_tokenizer(path: Path, required: bool = True) -> Path | None:
    """The folder that holds `tokenizer.json`, given that folder or the file.

    Raises:
        ConversionError: there is none, and one is required.
    """
    folder = path.parent if path.name == "tokenizer.json" else path
    if (folder / "tokenizer.json").is_file():
        return folder
    if required:
        raise ConversionError(f"{path} holds no tokenizer.json: pass --tokenizer with a folder that does")
    return None


def special_token_ids(folder: Path | None, vocabulary: int) -> dict[str, int]:
    """Id of each added token of a tokenizer; empty where there is no tokenizer.

    Raises:
        ConversionError: it is no tokenizer, or has ids that a model of this vocabulary does not know.
    """
    if folder is None:
        return {}
    path = folder / "tokenizer.json"
    content = _read_json(folder, path.name)
    try:
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
        ids = [*content["model"]["vocab"].values(), *added.values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is no byte-level BPE tokenizer ({error!r}): pass another") from None
    if any(type(index) is not int or not 0 <= index < vocabulary for index in ids):
        raise ConversionError(
            f"{path} has ids above the model's vocabulary of {vocabulary}: pass --tokenizer with its own"
        )
    return added


def tokenizer_files(folder: Path, config: dict[str, Any], root: Path) -> dict[str, bytes]:
    """Name to content of the tokenizer files to write.

    Args:
        folder: where the source's `tokenizer.json` lies.
        config: the model's config, for the special tokens and the length.
        root: where this project's tokenizer module, tokenizer_config.json and chat template lie.
    """
    names = {index: name for name, index in special_token_ids(folder, config["vocab_size"]).items()}
    try:
        settings = _read_json(folder, "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        own = _read_json(root, "tokenizer_config.json")
        template = folder
        for token in ("bos_token", "eos_token", "pad_token"):
            ids = config[f"{token}_id"]
            index = ids[0] if isinstance(ids, list) else ids
            if index in names:
                settings[token] = names[index]
        settings.setdefault("model_max_length", config["max_position_embeddings"])
        if settings.get("auto_map") != own["auto_map"]:
            # Made for another class, whose template does not know the envelope.
            settings.pop("chat_template", None)
            template = root
            settings.update({key: own[key] for key in _OWN_SETTINGS})
            # Transformers 5 writes a list under the first name, which 4 reads under the second.
            if isinstance(settings.get("extra_special_tokens"), list):
                settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    except (AttributeError, KeyError, TypeError) as error:
        raise ConversionError(f"{folder / 'tokenizer_config.json'} is no tokenizer config ({error!r})") from None
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files = {"tokenizer.json": _read(folder, "tokenizer.json"), "tokenizer_config.json": text.encode()}
    if (template / TEMPLATE).exists():
        files[TEMPLATE] = _read(template, TEMPLATE)
    return files


def _read(folder: Path, name: str) -> bytes:
    path = inside(folder, name, folder)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads(_read(folder, name))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{folder / name} is no valid JSON ({error}): pass --tokenizer with another") from None
