"""Finds the tokenizer files of a checkpoint, reads them within bounds, and writes them so that they load.

A tokenizer with HRM-Text's prompt tokens becomes this project's class. Any other keeps its class, files and template.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .paths import inside
from .reading import is_there, read_bytes, read_json, read_text, shown


MODULE = "tokenization_hrm_text.py"
TEMPLATE = "chat_template.jinja"
PADDING = "<|endoftext|>"
CONDITIONS = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
# How this project's class is named and set up, taken over from the project's own tokenizer_config.json.
_OWN_SETTINGS = (
    "auto_map",
    "clean_up_tokenization_spaces",
    "default_condition",
    "model_input_names",
    "padding_side",
    "tokenizer_class",
)
# Any of these is a vocabulary that transformers can make a tokenizer of.
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
_VOCABULARIES = ("tokenizer.json", *_PIECES, "vocab.json", "vocab.txt")
_OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", TEMPLATE)
# Where transformers keeps named templates beside the one of a chat.
_NAMED_TEMPLATES = "additional_chat_templates"
_MOST_NAMED_TEMPLATES = 32
_TOOL_CALL = ("<tool_call>", "</tool_call>")
_TEXT_SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Envelope:
    """The tokens of a prompt as a checkpoint names them: what opens and closes it, ends an answer, and conditions."""

    start: str = "<|im_start|>"
    end: str = "<|im_end|>"
    answer_end: str = "<|box_end|>"
    conditions: tuple[tuple[str, str], ...] = tuple(CONDITIONS.items())


@dataclass(frozen=True)
class Tokenizer:
    """What is beside a checkpoint.

    Attributes:
        folder: where its files lie.
        names: its files.
        named_templates: of its files, those in `additional_chat_templates`.
        settings: `tokenizer_config.json`.
        ids: id of each added token.
        template: its chat template, None where it has none.
    """

    folder: Path
    names: tuple[str, ...]
    settings: dict[str, Any]
    ids: dict[str, int]
    template: str | None
    named_templates: tuple[str, ...] = ()

    def special_id(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token` or `pad_token` as the settings name them."""
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return self.ids.get(token) if isinstance(token, str) else None


def find_tokenizer(path: Path, required: bool = True) -> Path | None:
    """The folder that holds a tokenizer, given that folder or its `tokenizer.json`.

    Raises:
        ConversionError: there is none, and one is required; or one of its files is not a regular file.
    """
    folder = path.parent if path.name == "tokenizer.json" else path
    if folder.is_dir() and any(is_there(folder, name) for name in _VOCABULARIES):
        return folder
    if required:
        raise ConversionError(f"{path} holds no tokenizer.json: pass --tokenizer with a folder that does")
    return None


def read_tokenizer(folder: Path | None, vocabulary: int) -> Tokenizer | None:
    """Reads and checks the files of a tokenizer; None where there is none.

    Args:
        folder: as of `find_tokenizer`.
        vocabulary: number of tokens of the model.

    Raises:
        ConversionError: it is not a tokenizer, needs code of its own, or has ids that the model does not have.
    """
    if folder is None:
        return None
    names = tuple(name for name in (*_VOCABULARIES, *_OTHERS) if is_there(folder, name))
    settings = read_json(folder, "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    where = folder / "tokenizer_config.json"
    for name in _TEXT_SETTINGS:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ConversionError(f"{where}: {name} is {shown(settings[name])}, which is not a token")
    for name in ("tokenizer_class", "default_condition", "prompt_end"):
        if not isinstance(settings.get(name), str | None):
            raise ConversionError(f"{where}: {name} is {shown(settings[name])}; it must be a string")
    if not isinstance(settings.get("trained_on_tools", False), bool):
        raise ConversionError(f"{where}: trained_on_tools is {shown(settings['trained_on_tools'])}, not true or false")
    conditions = settings.get("condition_tokens", {})
    if not isinstance(conditions, dict) or not all(isinstance(token, str) for token in conditions.values()):
        raise ConversionError(f"{where}: condition_tokens is not a table of tokens")
    ids = _ids(folder, names, settings, vocabulary)
    return Tokenizer(folder, names, settings, ids, _template(folder, names, settings), _named_templates(folder))


def _ids(folder: Path, names: tuple[str, ...], settings: dict[str, Any], vocabulary: int) -> dict[str, int]:
    added: dict[str, Any] = {}
    everything: list[Any] = []
    try:
        for index, entry in settings.get("added_tokens_decoder", {}).items():
            added[entry["content"]] = int(index)
        if "added_tokens.json" in names:
            added.update(read_json(folder, "added_tokens.json"))
        if "tokenizer.json" in names:
            content = read_json(folder, "tokenizer.json")
            added.update({entry["content"]: entry["id"] for entry in content.get("added_tokens") or []})
            pieces = content["model"]["vocab"]
            # A byte-level vocabulary is a table, one of pieces with scores a list.
            everything = list(pieces.values()) if isinstance(pieces, dict) else list(range(len(pieces)))
        elif "vocab.json" in names:
            everything = list(read_json(folder, "vocab.json").values())
        elif "vocab.txt" in names:
            everything = list(range(read_text(folder, "vocab.txt").rstrip("\n").count("\n") + 1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error!r}): pass another") from None
    for token, index in [*added.items(), *(("", index) for index in everything)]:
        if type(token) is not str or type(index) is not int or not 0 <= index < vocabulary:
            raise ConversionError(
                f"{folder}: the tokenizer has ids above the model's vocabulary of {vocabulary}: pass --tokenizer with "
                "its own"
            )
    return added


def _template(folder: Path, names: tuple[str, ...], settings: dict[str, Any]) -> str | None:
    """The chat template: of the file, else of the settings, where a list names several."""
    if TEMPLATE in names:
        return read_text(folder, TEMPLATE)
    stored = settings.get("chat_template")
    if isinstance(stored, list):
        try:
            stored = {entry["name"]: entry["template"] for entry in stored}
        except (KeyError, TypeError):
            stored = 0
    if isinstance(stored, dict):
        stored = stored.get("default")
    if not isinstance(stored, str | None):
        raise ConversionError(f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor named texts")
    return stored


def _named_templates(folder: Path) -> tuple[str, ...]:
    """The names of the templates that lie in a folder of their own, in order."""
    path = inside(folder, _NAMED_TEMPLATES, folder)
    if not path.is_dir():
        return ()
    try:
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".jinja")
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if len(found) > _MOST_NAMED_TEMPLATES:
        raise ConversionError(f"{path} holds more than {_MOST_NAMED_TEMPLATES} templates: it is not what it should be")
    return tuple(found)


def _named_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    folder = tokenizer.folder / _NAMED_TEMPLATES
    return {f"{_NAMED_TEMPLATES}/{name}": read_text(folder, name).encode() for name in tokenizer.named_templates}


def speaks(tokenizer: Tokenizer, envelope: Envelope, config: dict[str, Any]) -> bool:
    """Whether the tokenizer has the tokens of the envelope, and the config's bos token is the one that opens it."""
    ids = tokenizer.ids
    if (
        "tokenizer.json" not in tokenizer.names
        or not {envelope.start, envelope.end, envelope.answer_end} <= ids.keys()
    ):
        return False
    return ids[envelope.start] == config.get("bos_token_id")


def kept_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name to content of the files of a tokenizer that is kept as it is.

    Raises:
        ConversionError: it is made by code of its own, which is neither run nor copied.
    """
    files = {name: read_bytes(tokenizer.folder, name) for name in tokenizer.names}
    files |= _named_files(tokenizer)
    settings = tokenizer.settings
    if "auto_map" in settings:
        made_of = settings.get("tokenizer_class")
        if made_of not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            raise ConversionError(
                f"{tokenizer.folder / 'tokenizer_config.json'}: the tokenizer is made by code of its own "
                f"({shown(settings['auto_map'])}), which is not run; pass --tokenizer with a class of transformers"
            )
        settings = {key: value for key, value in settings.items() if key != "auto_map"}
    if "tokenizer.json" in tokenizer.names and "tokenizer_class" not in settings:
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    if settings != tokenizer.settings:
        files["tokenizer_config.json"] = _json(settings)
    return files


def own_files(
    tokenizer: Tokenizer,
    config: dict[str, Any],
    envelope: Envelope,
    root: Path,
    keep_template: bool,
    default_condition: str | None = None,
) -> dict[str, bytes]:
    """Name to content of the files of a tokenizer that becomes this project's class.

    Args:
        tokenizer: the checkpoint's.
        config: the model's config, for the special tokens and the length.
        envelope: what the checkpoint calls the tokens of a prompt.
        root: where this project's tokenizer_config.json and chat template lie.
        keep_template: keep the checkpoint's chat template, which knows tools, in place of the project's.
        default_condition: condition of a prompt that names none; None is the checkpoint's or the project's.
    """
    names = {index: name for name, index in tokenizer.ids.items()}
    settings = dict(tokenizer.settings)
    own = json.loads((root / "tokenizer_config.json").read_text(encoding="utf-8"))
    for token in ("bos_token", "eos_token", "pad_token"):
        ids = config[f"{token}_id"]
        index = ids[0] if isinstance(ids, list) and ids else ids
        if index in names:
            settings[token] = names[index]
    settings.setdefault("model_max_length", config["max_position_embeddings"])
    if is_ours := settings.get("auto_map") == own["auto_map"]:
        template = tokenizer.template if TEMPLATE in tokenizer.names else None
    else:
        settings.pop("chat_template", None)
        template = tokenizer.template
        kept = {key: settings[key] for key in ("default_condition",) if key in settings}
        settings.update({key: own[key] for key in _OWN_SETTINGS})
        settings.update(kept)
        # Transformers 5 writes a list under the first name, which 4 reads under the second.
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if default_condition is not None:
        settings["default_condition"] = default_condition
    if keep_template and all(token in tokenizer.ids for token in _TOOL_CALL):
        settings.setdefault("trained_on_tools", True)
    if envelope.end != Envelope.end:
        settings["prompt_end"] = envelope.end
    if envelope.conditions != Envelope.conditions:
        settings["condition_tokens"] = dict(envelope.conditions)
        tags = (tag.strip() for tag in settings.get("default_condition", "direct").split(","))
        if not all(tag in ("", *dict(envelope.conditions)) for tag in tags):
            settings["default_condition"] = ""
    files = {
        "tokenizer.json": read_bytes(tokenizer.folder, "tokenizer.json"),
        "tokenizer_config.json": _json(settings),
    }
    if is_ours or keep_template:
        files |= _named_files(tokenizer)
    else:
        template = _own_template(root, envelope)
    if template is not None:
        files[TEMPLATE] = template.encode()
    return files


def _own_template(root: Path, envelope: Envelope) -> str:
    """The project's chat template with the tokens of the envelope in the place of the 1B's."""
    text = (root / TEMPLATE).read_text(encoding="utf-8")
    if envelope == Envelope():
        return text
    usual = Envelope()
    for old, new in (
        (json.dumps(dict(usual.conditions)), json.dumps(dict(envelope.conditions), ensure_ascii=False)),
        *(
            (f'"{getattr(usual, part)}"', json.dumps(getattr(envelope, part)))
            for part in ("start", "end", "answer_end")
        ),
    ):
        if text.count(old) != 1:
            raise ValueError(f"{TEMPLATE} names {old} {text.count(old)} times, and should once")
        text = text.replace(old, new)
    return text


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
