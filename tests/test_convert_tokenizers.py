"""Checkpoints with other tokenizers and templates: kept as they are, and their prompts found."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from convert_weights import convert, main

from .chat_material import corpus
from .checkpoints import HEADS, published_config, save_published, save_training_settings
from .test_convert_output import small_tokenizer


GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '<end_of_role>\n\n' + m.content | trim }}"
    "{{ '<end_of_turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant<end_of_role>\n\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WITH_SYSTEM = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}" + CHATML
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "19"},
    {"role": "user", "content": "Reverse the word stone."},
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<end_of_role>"]
HEADERS = [*SPECIAL[:4], "<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>"]
FAMILY = [f"<{index}>" for index in range(5)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]
FAMILY += ["<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"]


def train_tokenizer(folder, kind="bytes", template=GEMMA, special=SPECIAL, **settings):
    """A small tokenizer as others publish theirs: byte-level, or of pieces with scores as sentencepiece makes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Replace("\u2581", " ")
        letters = sorted({letter for text in corpus(200) for letter in text} | set("\nabcdefghijklmnopqrstuvwxyz():"))
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", initial_alphabet=letters
        )
    tokenizer.train_from_iterator(corpus(1000), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} if special[:4] == SPECIAL[:4] else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_checkpoint(folder, **config):
    """Small random weights with a vocabulary for `train_tokenizer`."""
    generator = torch.Generator().manual_seed(0)
    width, vocabulary, inner = 32, 512, 64
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    for stack in "HL":
        layer = f"model.{stack}_module.layers.0."
        shapes[layer + "attn.gqkv_proj.weight"] = (4 * width, width)
        shapes[layer + "attn.o_proj.weight"] = (width, width)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * inner, width)
        shapes[layer + "mlp.down_proj.weight"] = (width, inner)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    tensors["model.z_L_init"] = torch.randn(width, generator=generator)
    fields = {"vocab_size": vocabulary, "intermediate_size": inner, "num_layers_per_stack": 1, "num_hidden_layers": 8}
    fields |= {"num_attention_heads": HEADS, "max_position_embeddings": 512}
    fields |= {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0, **config}
    return save_published(folder, tensors, published_config(**fields))


def blocks(tokenizer, ids, types):
    """The texts of the blocks of a row, one after the other."""
    texts, row = [], list(zip(ids.tolist(), types.tolist()))
    for position, (token, kind) in enumerate(row):
        if kind == 2 or (kind == 1 and (position == 0 or row[position - 1][1] == 0)):
            texts.append([])
        if kind:
            texts[-1].append(token)
    return [tokenizer.decode(tokens) for tokens in texts]


def infer(model, ids):
    """The types that the model infers."""
    module = __import__("sys").modules[type(model).__module__.rpartition(".")[0] + ".layout_hrm_text"]
    return module.infer_token_type_ids(ids, model.config.prefix_start, model.config.prefix_end)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_another_tokenizer_and_template_stay_and_their_turns_are_blocks(tmp_path, kind, capsys):
    source = make_checkpoint(tmp_path / "source")
    train_tokenizer(source, kind)
    assert main([str(source), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "prompts    read in both directions from <start_of_turn> " in printed
    assert "up to the next <end_of_turn>; the tokenizer and its chat template stay as they are" in printed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "None" not in (tmp_path / "out" / "README.md").read_text()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(tokenizer).__name__ != "HrmTextTokenizer" and not hasattr(tokenizer, "encode_prompt")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nWhat is 12 + 7?<end_of_turn>\n<start_of_turn>model\n19<end_of_turn>\n"
        "<start_of_turn>user\nReverse the word stone.<end_of_turn>\n<start_of_turn>model\n"
    )
    encoding = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = encoding["input_ids"]
    types = infer(model, ids)
    found = blocks(tokenizer, ids[0], types[0])
    turns = [f"<start_of_turn>user\n{CHAT[at]['content']}<end_of_turn>" for at in (0, 2)]
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in turns]

    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(ids, **arguments)
    grown = ids
    with torch.no_grad():
        for _ in range(8):
            padded = torch.nn.functional.pad(types, (0, grown.shape[1] - types.shape[1]))
            logits = model(grown, token_type_ids=padded, use_cache=False).logits
            grown = torch.cat([grown, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, grown)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe(CHAT, return_full_text=False, **arguments)[0]["generated_text"]
    said = said[-1]["content"] if isinstance(said, list) else said
    assert said == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "special", "config", "start"),
    [
        (LLAMA, SPECIAL, {}, "<start_of_turn> user"),
        (LLAMA_3, HEADERS, {}, "<|start_header_id|> user"),
        (WITH_SYSTEM, [*SPECIAL[:4], "<|im_start|>", "<|im_end|>"], {"eos_token_id": 5}, "<|im_start|> user"),
        (CHATML, [*SPECIAL[:4], "<|im_start|>", "<|im_end|>"], {"eos_token_id": 5}, "<|im_start|> user"),
        (CHATML, FAMILY, {"bos_token_id": 6, "eos_token_id": 7, "pad_token_id": 5}, "<|im_start|> user"),
        (CHATML, FAMILY, {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}, "<|im_start|> user"),
    ],
)  # fmt: skip
def test_turns_of_other_templates(tmp_path, template, special, config, start):
    source = make_checkpoint(tmp_path / "source", **config)
    train_tokenizer(source, template=template, special=special)
    done = convert(source, tmp_path / "out", verification=False, progress=False)
    # A token of the word that begins it is enough, where that tells turns apart.
    assert done.plan.prompts.startswith(f"read in both directions from {start[:-3]}")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(written["prefix_start_token_ids"]) >= 2
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == template and "auto_map" not in settings

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    system = [{"role": "system", "content": "Be short, user."}]
    for chat in (CHAT, CHAT if template is WITH_SYSTEM else system + CHAT):
        encoding = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        types = infer(model, encoding["input_ids"])
        found = blocks(tokenizer, encoding["input_ids"][0], types[0])
        assert [text.count(CHAT[at]["content"]) for text, at in zip(found, (0, 2), strict=True)] == [1, 1]
        assert all(text.startswith(start.replace(" ", "")[:-3]) and "system" not in text for text in found)
        arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answer = model.generate(encoding["input_ids"], **arguments)
        assert torch.equal(answer, model.generate(encoding["input_ids"], token_type_ids=types, **arguments))


@pytest.mark.parametrize(("template", "why"), [(PLAIN, "does not tell turns apart"), (None, "has no chat template")])
def test_where_no_turn_can_be_found_nothing_is_inferred_and_it_is_said(tmp_path, template, why):
    source = make_checkpoint(tmp_path / "source")
    train_tokenizer(source, template=template)
    with pytest.warns(UserWarning, match=why):
        done = convert(source, tmp_path / "out", verification=False, progress=False)
    assert done.plan.prompts.startswith("read causally unless token_type_ids are given")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["prefix_end_token_id"] is None


def test_what_a_config_says_of_its_prompts_stays(tmp_path):
    fields = {"prefix_start_token_ids": [4, 90], "prefix_end_token_id": [5, 91]}
    source = make_checkpoint(tmp_path / "source", **fields)
    train_tokenizer(source)
    done = convert(source, tmp_path / "out", verification=False, progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in fields} == fields
    assert done.plan.prompts.startswith("read in both directions from <start_of_turn> token 90")


def test_the_usual_envelope_with_a_template_of_its_own(tmp_path):
    """A template that writes the envelope becomes the project's, with its condition; one that knows tools is kept."""
    once = "{{ START + m.content + '<|im_end|>' if m.role == 'user' else m.content + '<|box_end|>' }}"
    once = "{% for m in messages %}" + once + "{% endfor %}"
    simple = once.replace("START", "'<|im_start|><|quad_end|><|object_ref_end|>'")
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + once.replace("START", "'<|im_start|>'")
    config = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    for name, template, condition in (("simple", simple, "synth,cot"), ("tools", tools, "")):
        source = make_checkpoint(tmp_path / name, **config)
        train_tokenizer(source, template=template, special=FAMILY)
        done = convert(source, tmp_path / f"out_{name}", verification=False, progress=False)
        assert done.plan.prompts.startswith("read in both directions from <|im_start|> up to the next <|im_end|>")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"out_{name}", trust_remote_code=True)
        assert type(tokenizer).__name__ == "HrmTextTokenizer" and tokenizer.default_condition == condition
        assert (tokenizer.chat_template == template) == (name == "tools")
        encoding = tokenizer.apply_chat_template(CHAT[:1], return_dict=True)
        assert dict(encoding) == dict(tokenizer.encode_prompt(CHAT[0]["content"]))


def test_a_training_run_with_tokens_of_its_own(tmp_path):
    """The metadata names what opens and closes a prompt, ends an answer, and the conditions."""
    from .checkpoints import published_tensors, save_training

    source = save_training(tmp_path / "run", {1: (published_tensors(), published_tensors())})
    save_training_settings(source)
    text = (source / "train_metadata.yaml").read_text()
    for old, new in (("<|im_start|>", "<ask>"), ("<|im_end|>", "</ask>"), ("<|box_end|>", "<done>")):
        text = text.replace(old, new)
    text = text.replace("    cot: <|object_ref_end|>\n", "    think: <think>\n").replace(
        "    noisy: <|quad_start|>\n", ""
    )
    (source / "train_metadata.yaml").write_text(text)
    small = small_tokenizer(tmp_path / "tokenizer")
    content = (small / "tokenizer.json").read_text()
    for old, new in (
        ("im_start", "<ask>"),
        ("im_end", "</ask>"),
        ("box_end", "<done>"),
        ("object_ref_end", "<think>"),
    ):
        content = content.replace(f"<|{old}|>", new)
    (small / "tokenizer.json").write_text(content)
    convert(source, tmp_path / "out", tokenizer=small, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.condition_tokens == {
        "direct": "<|object_ref_start|>",
        "synth": "<|quad_end|>",
        "think": "<think>",
    }
    assert tokenizer.encode_prompt("ab", "synth,think")["input_ids"] == [6, 13, 9, 14, 15, 7]
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    text = tokenizer.apply_chat_template(chat, condition="think", tokenize=False)
    assert text == "<ask><think>ab</ask>c<done>"
    with pytest.raises(ValueError, match="known are direct, synth, think"):
        tokenizer.encode_prompt("ab", "noisy")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.encode_prompt("ab") == tokenizer.encode_prompt("ab")
    convert(tmp_path / "out", tmp_path / "twice", verification=False, progress=False)
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["prefix_end_token_id"] == 7


def test_a_tokenizer_made_by_code_of_its_own_is_refused(tmp_path):
    from .checkpoints import assert_refused

    source = make_checkpoint(tmp_path / "source")
    train_tokenizer(source, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    assert_refused(source, "tokenizer_config.json: the tokenizer is made by code of its own")


def test_a_template_that_never_ends_is_left(tmp_path, monkeypatch):
    from conversion import probe

    monkeypatch.setattr(probe, "SECONDS", 2)
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    source = make_checkpoint(tmp_path / "source")
    train_tokenizer(source, template=forever)
    with pytest.warns(UserWarning, match="does not render a chat"):
        convert(source, tmp_path / "out", verification=False, progress=False)


def test_our_class_refuses_a_tokenizer_without_its_tokens(tmp_path):
    folder = train_tokenizer(tmp_path / "other")
    from .tiny import load_class

    with pytest.raises(ValueError, match="not an HRM-Text tokenizer"):
        load_class("tokenization_hrm_text.HrmTextTokenizer")(str(folder / "tokenizer.json"))
