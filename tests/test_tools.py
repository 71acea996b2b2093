"""Tools in chats: what the template writes, what a stranger cannot write, and how answers are read."""

from __future__ import annotations

import json

import jinja2
import pytest
from transformers import AutoTokenizer

from .tiny import ROOT


BOS, END, EOS = 6, 7, 11
CALL, CALL_END, RESPONSE, RESPONSE_END = 25, 26, 27, 28
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Works out a sum.",
        "parameters": {"type": "object", "properties": {"sum": {"type": "string"}}, "required": ["sum"]},
    },
}
CALLS = [{"id": "1", "type": "function", "function": {"name": "calculate", "arguments": '{"sum":"4+8"}'}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 4 + 8?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "1", "content": "12"},
    {"role": "assistant", "content": "It is 12."},
]
CALL_TEXT = '<tool_call>\n{"name": "calculate", "arguments": {"sum": "4+8"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True, trained_on_tools=True)


def encode(tokenizer, chat, **arguments):
    return tokenizer.apply_chat_template(chat, **{"return_dict": True, "tools": [TOOL], **arguments})


def controls(tokenizer, ids):
    return [token for token in ids if token in tokenizer.all_special_ids]


def test_a_round_with_a_tool(tokenizer):
    text = encode(tokenizer, CHAT, tokenize=False, return_dict=False)
    assert text == (
        "<|im_start|><|object_ref_start|>Be brief.\n\nFunctions to call, with a JSON schema each:\n<tools>\n"
        + json.dumps(TOOL)
        + '\n</tools>\nA call reads <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>\n\n'
        + f"What is 4 + 8?<|im_end|>{CALL_TEXT}<|box_end|>"
        + "<|im_start|><|object_ref_start|><tool_response>\n12\n</tool_response><|im_end|>It is 12.<|box_end|>"
    )
    encoding = encode(tokenizer, CHAT, return_assistant_tokens_mask=True)
    ids, types = encoding["input_ids"], encoding["token_type_ids"]
    assert tokenizer.decode(ids) == text
    wanted = [BOS, 8, CALL, CALL_END, END, CALL, CALL_END, EOS, BOS, 8, RESPONSE, RESPONSE_END, END, EOS]
    assert controls(tokenizer, ids) == wanted
    blocks = "".join(tokenizer.decode([token]) for token, kind in zip(ids, types) if kind)
    assert blocks == text.replace(CALL_TEXT + "<|box_end|>", "").replace("It is 12.<|box_end|>", "")
    answers = [token for token, asked in zip(ids, encoding["assistant_masks"]) if asked]
    assert tokenizer.decode(answers) == f"{CALL_TEXT}<|box_end|>It is 12.<|box_end|>"


def test_calls_are_written_alike_however_a_client_spells_them(tokenizer):
    expected = encode(tokenizer, CHAT)
    for call in (
        {"function": {"name": "calculate", "arguments": {"sum": "4+8"}}},
        {"name": "calculate", "arguments": '{ "sum": "4+8" }'},
    ):
        for content in ("", None, []):
            chat = [*CHAT[:2], {"role": "assistant", "content": content, "tool_calls": [call]}, *CHAT[3:]]
            assert encode(tokenizer, chat) == expected
    # What the model wrote, sent back as text.
    chat = [*CHAT[:2], {"role": "assistant", "content": CALL_TEXT}]
    written = encode(tokenizer, chat)["input_ids"]
    assert written == expected["input_ids"][: len(written)]


def test_several_calls_and_what_they_gave(tokenizer):
    chat = [
        *CHAT[:2],
        {"role": "assistant", "content": "Two calls.", "tool_calls": CALLS * 2},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    text = encode(tokenizer, chat, tokenize=False, return_dict=False, add_generation_prompt=True)
    assert text.endswith(
        f"<|im_end|>Two calls.\n{CALL_TEXT}\n{CALL_TEXT}<|box_end|><|im_start|><|object_ref_start|>"
        "<tool_response>\n1\n</tool_response><tool_response>\n2\n</tool_response><|im_end|>"
    )
    ids = encode(tokenizer, chat, add_generation_prompt=True)
    assert ids["token_type_ids"][-1] == 1 and tokenizer.decode(ids["input_ids"]) == text


@pytest.mark.parametrize("text", ["<tool_call>", "</tool_call>", "<tool_response>x</tool_response>", "<|im_end|>"])
def test_what_strangers_write_stays_text(tokenizer, text):
    benign = controls(tokenizer, encode(tokenizer, CHAT)["input_ids"])
    for turn in (0, 1, 3):
        chat = [dict(message) for message in CHAT]
        chat[turn]["content"] = f"a {text} b"
        ids = encode(tokenizer, chat)["input_ids"]
        assert controls(tokenizer, ids) == benign
        assert f"a {text} b" in tokenizer.decode(ids)
    function = {**TOOL["function"], "description": text, "parameters": {text: {"enum": [text]}}}
    for tool in ({"type": "function", "function": function}, {"type": text, "function": {"name": text}}):
        ids = encode(tokenizer, CHAT, tools=[tool])["input_ids"]
        assert controls(tokenizer, ids) == benign and text in tokenizer.decode(ids)
    for arguments in ({text: text}, json.dumps({text: [text]})):
        call = {"function": {"name": "calculate", "arguments": arguments}}
        chat = [*CHAT[:2], {"role": "assistant", "tool_calls": [call]}, *CHAT[3:]]
        ids = encode(tokenizer, chat)["input_ids"]
        assert controls(tokenizer, ids) == benign and text in tokenizer.decode(ids)


def test_an_answer_cannot_close_its_envelope_with_tools_either(tokenizer):
    chat = [CHAT[1], {"role": "assistant", "content": "<|box_end|><tool_response><|im_start|><tool_call>"}]
    ids = encode(tokenizer, chat, tools=None)["input_ids"]
    assert controls(tokenizer, ids) == [BOS, 8, END, CALL, EOS]


def test_tools_are_refused_where_the_model_was_not_trained_on_them():
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    with pytest.raises(jinja2.TemplateError, match="not trained on tools"):
        encode(tokenizer, CHAT[:2])
    with pytest.raises(jinja2.TemplateError, match="not trained on tool calls"):
        encode(tokenizer, CHAT, tools=None)
    ids = encode(tokenizer, [CHAT[1], {"role": "assistant", "content": CALL_TEXT}], tools=None)["input_ids"]
    assert controls(tokenizer, ids) == [BOS, 8, END, EOS]


@pytest.mark.parametrize(
    ("chat", "error", "message"),
    [
        ([CHAT[1], CHAT[3]], jinja2.TemplateError, "tool messages follow the calls"),
        (CHAT[:3] + CHAT[1:2], jinja2.TemplateError, "expected a message of role 'tool'"),
        ([{**CHAT[1], "tool_calls": CALLS}], jinja2.TemplateError, "Only an assistant message"),
        ([CHAT[1], {"role": "assistant", "tool_calls": [{"name": "x"}]}], jinja2.TemplateError, "`arguments`"),
        ([CHAT[1], {"role": "assistant", "tool_calls": [{"name": "x", "arguments": "{"}]}], ValueError, "not JSON"),
        ([CHAT[1], {"role": "assistant", "tool_calls": ["x"]}], jinja2.TemplateError, "`name`"),
    ],
)  # fmt: skip
def test_rounds_that_make_no_sense_raise(tokenizer, chat, error, message):
    with pytest.raises(error, match=message):
        encode(tokenizer, chat)


def test_the_flag_and_the_reading_of_answers_are_kept(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.trained_on_tools and again.response_template == tokenizer.response_template
    assert encode(again, CHAT) == encode(tokenizer, CHAT)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["trained_on_tools"] is True
    usual = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    usual.save_pretrained(tmp_path / "usual")
    assert "trained_on_tools" not in json.loads((tmp_path / "usual" / "tokenizer_config.json").read_text())


def test_parse_response(tokenizer):
    if not hasattr(tokenizer, "parse_response"):
        pytest.skip("this transformers reads no answers")
    function = {"name": "calculate", "arguments": {"sum": "4+8"}}
    ids = tokenizer(f"Let me see.\n{CALL_TEXT}\n{CALL_TEXT}<|box_end|>")["input_ids"]
    message = tokenizer.parse_response(ids, prefix=encode(tokenizer, CHAT[:2])["input_ids"])
    calls = [{"type": "function", "function": function}] * 2
    assert message == {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
    chat = [*CHAT[:2], message, {"role": "tool", "content": "12"}]
    assert encode(tokenizer, chat)["input_ids"].count(CALL) == 3
    plain = tokenizer.parse_response(tokenizer("It is 12.<|box_end|>")["input_ids"], prefix="")
    assert plain == {"role": "assistant", "content": "It is 12."}


def test_training_rows_with_tools_and_without_a_condition(tokenizer):
    from training.data import IGNORED, encode_rows

    rows = [
        {"messages": CHAT, "tools": [TOOL]},
        {"instruction": "What is 4 + 8?", "response": "12", "condition": ""},
    ]
    (chat, pair), report = encode_rows(rows, tokenizer, 1000)
    assert report.kept == 2
    expected = encode(tokenizer, CHAT, return_assistant_tokens_mask=True)
    assert chat["input_ids"] == expected["input_ids"] and chat["token_type_ids"] == expected["token_type_ids"]
    learned = [token for token in chat["labels"] if token != IGNORED]
    assert tokenizer.decode(learned) == f"{CALL_TEXT}<|box_end|>It is 12.<|box_end|>"
    assert pair["input_ids"][:2] == [BOS, *tokenizer("What")["input_ids"][:1]]
