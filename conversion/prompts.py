"""How the prompts of a checkpoint are read: what opens and closes a block, and whose chat template writes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .probe import probe
from .reading import shown
from .sources import Source
from .tokenizer import Tokenizer, kept_files, own_files, speaks


@dataclass(frozen=True)
class Prompts:
    """What was found.

    Attributes:
        fields: `prefix_start_token_ids` and `prefix_end_token_id` of the config, the first only where it is not bos.
        line: one sentence for the user.
        files: the tokenizer's files.
        own: whether the tokenizer becomes this project's class.
        warnings: what the user should know.
    """

    fields: dict[str, Any]
    line: str
    files: dict[str, bytes]
    own: bool
    warnings: list[str]


def find_prompts(source: Source, root: Path) -> Prompts:
    """Decides how prompts are read, from the config, the tokenizer's files and, where it has one, its chat template.

    Args:
        source: the opened checkpoint.
        root: where this project's tokenizer files lie.

    Raises:
        ConversionError: the tokenizer is made by code of its own, or its chat template was not rendered in time.
    """
    config, tokenizer = source.config, source.tokenizer
    fields = {key: config.get(key) for key in ("prefix_start_token_ids", "prefix_end_token_id")}
    if tokenizer is None:
        return Prompts(fields, _line(fields, config, {}, "no tokenizer was found"), {}, False, [])
    names = {index: token for token, index in tokenizer.ids.items()}
    mine = speaks(tokenizer, source.envelope, config)
    is_ours = "tokenization_hrm_text.HrmTextTokenizer" in str(tokenizer.settings.get("auto_map"))[:1000]
    own_template = (root / "chat_template.jinja").read_text(encoding="utf-8")
    if mine and (is_ours or tokenizer.template in (None, own_template)):
        files = own_files(tokenizer, config, source.envelope, root, keep_template=False)
        return Prompts(fields, _line(fields, config, names, ""), files, True, [])
    found = None
    if tokenizer.template is not None:
        files = kept_files(tokenizer)
        try:
            found = probe(files)
        except TimeoutError as error:
            raise ConversionError(f"{tokenizer.folder}: {error}: try again when the machine is less busy") from None
    if mine:
        condition = _condition(found, source)
        if found is None or not found["writes"]:
            files = own_files(tokenizer, config, source.envelope, root, keep_template=False)
            warning = (
                f"{tokenizer.folder}: its chat template does not write a user's message; the usual one takes its place"
            )
            return Prompts(fields, _line(fields, config, names, ""), files, True, [warning])
        if condition is not None:
            keeps = found["tools"]
            files = own_files(tokenizer, config, source.envelope, root, keeps, default_condition=condition)
            said = "the chat template is the checkpoint's own" if keeps else ""
            return Prompts(fields, _line(fields, config, names, said), files, True, [])
    return _foreign(source, tokenizer, found, fields, names)


def _condition(found: dict[str, Any] | None, source: Source) -> str | None:
    """The condition that a template writes in the envelope, "" for none; None where it writes anything else."""
    if found is None or not found["writes"] or not found["after"] or found["after"][0] != source.envelope.end:
        return None
    tags = {token: tag for tag, token in source.envelope.conditions}
    before = found["before"]
    if not before or before[0] != source.envelope.start or any(token not in tags for token in before[1:]):
        return None
    return ",".join(tags[token] for token in before[1:])


def _foreign(
    source: Source, tokenizer: Tokenizer, found: dict[str, Any] | None, fields: dict[str, Any], names: dict[int, str]
) -> Prompts:
    warnings = []
    files = kept_files(tokenizer)
    if not source.prompts_stated:
        start, end = (found["start"], found["end"]) if found else (None, None)
        fields = {
            "prefix_start_token_ids": start,
            "prefix_end_token_id": end[0] if end and len(end) == 1 else end,
        }
    if found:
        names = {**{int(index): token for index, token in found["names"].items()}, **names}
    if fields["prefix_end_token_id"] is None:
        why = "its chat template does not tell turns apart" if found else "its chat template does not render a chat"
        warnings.append(
            f"{tokenizer.folder}: its prompts are not those of HRM-Text, and "
            + (why if tokenizer.template else "it has no chat template")
            + ": prompts are read causally unless token_type_ids are given; say what opens and closes them with "
            "prefix_start_token_ids and prefix_end_token_id in config.json"
        )
    kept = (
        "the tokenizer and its chat template stay as they are"
        if tokenizer.template
        else "the tokenizer stays as it is"
    )
    return Prompts(fields, _line(fields, source.config, names, kept), files, False, warnings)


def _line(fields: dict[str, Any], config: dict[str, Any], names: dict[int, str], remark: str) -> str:
    end, start = fields["prefix_end_token_id"], fields["prefix_start_token_ids"]
    if end is None or not config.get("prefix_lm", True):
        text = "read causally unless token_type_ids are given"
    else:
        opening, closing = _named(config["bos_token_id"] if start is None else start, names), _named(end, names)
        text = f"read in both directions from {opening} up to the next {closing}"
    return text + (f"; {remark}" if remark else "")


def _named(ids: Any, names: dict[int, str]) -> str:
    tokens = (names.get(index, f"token {index}") for index in (ids if isinstance(ids, list) else [ids]))
    return " ".join(token if token.isprintable() and len(token) < 40 else shown(token) for token in tokens)
