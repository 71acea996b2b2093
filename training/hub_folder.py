"""Model folders: this repository's classes as remote code, and what makes a folder complete."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conversion.output import AUTO_CLASSES


ROOT = Path(__file__).resolve().parent.parent


@cache
def load_class(reference: str) -> Any:
    """The class `module.Class` of this repository, as `trust_remote_code=True` would load it."""
    return get_class_from_dynamic_module(reference, str(ROOT))


def save_nano(model: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes weights, config, generation settings and tokenizer, and beside them the modules that load them.

    Args:
        model: an HRM-Text from `load_class`.
        tokenizer: an `HrmTextTokenizer` from `load_class`.
        folder: made if it does not exist; files of the same names are replaced. The root of the repository, which
            holds the modules, gets the model's own four files only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.use_cache = True  # the trainer switches it off
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    with TemporaryDirectory(dir=folder) as temporary:
        # Greedy, and not the 20 tokens that are the library's default.
        model.generation_config.update(do_sample=False, max_new_tokens=model.config.max_position_embeddings // 4)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        path = Path(temporary, "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        config["auto_map"] = AUTO_CLASSES
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
            shutil.copyfile(Path(temporary, name), folder / name)
    if folder.resolve() != ROOT:
        for source in (*ROOT.glob("*_hrm_text.py"), ROOT / "tokenizer_config.json", ROOT / "chat_template.jinja"):
            shutil.copyfile(source, folder / source.name)
