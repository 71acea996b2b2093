"""The folder that a trained model is written to: loadable with `trust_remote_code=True`, offline, by anyone."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
AUTO_CLASSES = {
    "configuration_hrm_text.HrmTextConfig": "AutoConfig",
    "modeling_hrm_text.HrmTextForCausalLM": "AutoModelForCausalLM",
    "tokenization_hrm_text.HrmTextTokenizer": "AutoTokenizer",
}


@cache
def load_class(reference: str) -> Any:
    """The class `module.Class` of this repository, as remote code, so that saving it takes its module along."""
    loaded = get_class_from_dynamic_module(reference, str(ROOT))
    loaded.register_for_auto_class(AUTO_CLASSES[reference])
    return loaded


def save_folder(model: torch.nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Writes weights, config, generation settings, tokenizer and the modules that they need.

    Args:
        model: an HRM-Text whose class came from a model folder or from `load_class`.
        tokenizer: an `HrmTextTokenizer`.
        folder: made if it does not exist; files of the same names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for module in ROOT.glob("*_hrm_text.py"):
        if not (folder / module.name).exists():
            shutil.copy(module, folder / module.name)
