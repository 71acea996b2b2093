"""Tokenizer files: found beside a checkpoint, and written so that they load as this project's class."""

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError


MODULE = "tokenization_hrm_text.py"
TEMPLATE = "chat_template.jinja"
# How this project's class is named and set up, taken over from the project's own tokenizer_config.json.
_OWN_SETTINGS = (
    "auto_map",
    "clean_up_tokenization_spaces",
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
        ids = [*content["model"]["vocab"].values(), *added.values()]
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path} is no byte-level BPE tokenizer ({error!r}): pass another") from None
    if any(type(index) is not int or not 0 <= index < vocabulary for index in ids):
        raise ConversionError(
            f"{path} has ids above the model's vocabulary of {vocabulary}: pass --tokenizer with its own"
        )
    return added


def tokenizer_files(folder: Path, config: dict[str, Any], root: Path | None) -> dict[str, bytes]:
    """Name to content of the tokenizer files to write.

    Args:
        folder: where the source's `tokenizer.json` lies.
        config: the model's config, for the special tokens and the length.
        root: where this project's tokenizer module and chat template lie; None leaves the files as they are, for a
            folder that carries no code.
    """
    names = {index: name for name, index in special_token_ids(folder, config["vocab_size"]).items()}
    settings_path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
        template_path = folder / TEMPLATE
        for token in ("bos_token", "eos_token", "pad_token"):
            field = f"{token}_id"
            index = config[field][0] if isinstance(config[field], list) else config[field]
            if index in names:
                settings[token] = names[index]
        settings.setdefault("model_max_length", config["max_position_embeddings"])
        if root is not None and (root / MODULE).exists():
            own = json.loads((root / "tokenizer_config.json").read_text(encoding="utf-8"))
            if settings.get("auto_map") != own["auto_map"]:
                # A template that was made for another class does not know the envelope.
                settings.pop("chat_template", None)
                template_path = root / TEMPLATE
            settings.update({key: own[key] for key in _OWN_SETTINGS if key in own})
            settings.setdefault("default_condition", own["default_condition"])
            # Transformers 5 writes a list under the first name, which 4 reads under the second.
            if isinstance(settings.get("extra_special_tokens"), list):
                settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
        if template_path.is_file():
            files[TEMPLATE] = template_path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConversionError(f"{settings_path} is no tokenizer config ({error}): download it again") from None
    files["tokenizer_config.json"] = (
        json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    ).encode()
    return files
