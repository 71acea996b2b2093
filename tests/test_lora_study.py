"""The study of adapters: that it goes on where it stopped, and the rule that only the output head holds."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from training import lora_study
from training.lora_study import CASES, FULL, SCALED, TASKS_TAUGHT, WITH_HEAD, main, measure, old_skills, rows, table

from .tiny import ROOT


pytest.importorskip("peft")


def test_nothing_is_both_taught_and_asked():
    for task, taught in TASKS_TAUGHT.items():
        train, held_out = rows(task, 0)
        assert len(train) == taught.rows and len(held_out) == lora_study.HELD_OUT
        assert not {row["instruction"] for row in train} & {row["instruction"] for row in held_out}
    assert old_skills(0) == old_skills(0) != old_skills(1)
    asked = [(task, case.name()) for group in CASES for task, case in group]
    assert len(set(asked)) == len(asked)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora_study, "CASES", ((("easy", FULL), ("hard", SCALED)),))
    monkeypatch.setattr(lora_study, "HELD_OUT", 8)
    monkeypatch.setattr(lora_study, "OLD_SKILLS", 1)
    short = {name: task._replace(steps=2, rows=32) for name, task in TASKS_TAUGHT.items()}
    monkeypatch.setattr(lora_study, "TASKS_TAUGHT", short)
    assert main(["--output", str(tmp_path), "--seeds", "1"]) == 0
    file = tmp_path / "results.jsonl"
    first = file.read_text().splitlines()
    assert [json.loads(line)["task"] for line in first] == ["easy", "hard"]
    file.write_text(first[0] + "\n")
    assert main(["--output", str(tmp_path), "--seeds", "1"]) == 0
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert {**again[1], "seconds": 0} == {**json.loads(first[1]), "seconds": 0}
    assert "| hard | lora r16 alpha 128, lr 0.001 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "hard.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_table_of_the_runs():
    file = ROOT / "training" / "lora_run" / "results.jsonl"
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert table(results) in (ROOT / "training" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tokens_that_were_never_trained_want_the_output_head():
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    without, with_head = (measure("format", case, 0, tokenizer)["learned"] for case in (SCALED, WITH_HEAD))
    assert without == 0 and with_head > 0.5
