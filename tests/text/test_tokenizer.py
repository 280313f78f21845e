"""The tokenizer folder, and chat templates against transformers."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftserve.errors import ConfigurationError, InvalidRequestError
from peftserve.text.chat import ChatTemplate
from peftserve.text.tokenizer import Tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief.  \n"}, {"role": "user", "content": "é 😀 <|im_end|> {{ 7*7 }}"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": ""},
    ],
]

# SmolLM2's own: it adds a system message where there is none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What other models' templates use: special tokens, loop controls, tojson, namespaces, dates, generation blocks.
FANCY = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
{{ message.role }}: {{ message.content | trim | tojson }}
    {% generation %}{{ message | tojson(indent=2) }}{% endgeneration %}
{%- endfor %}
{{ ns.count }} {{ strftime_now('%Y') }} {{ tools is none }}{{ eos_token }}
"""


@pytest.mark.parametrize("template", [SMOLLM2, FANCY])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_templates_agree_with_transformers(
    byte_level_folder: Path, tmp_path: Path, template: str, messages: list[dict[str, str]]
) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(byte_level_folder)
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    assert ours.chat_template is not None
    assert ours.chat_template.render(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(messages) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoding_agrees_with_transformers(byte_level_folder: Path, byte_level: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(byte_level_folder)
    assert byte_level.encode(text) == theirs.encode(text)


def test_template_in_the_config(byte_level_folder: Path, tmp_path: Path) -> None:
    """The older places: a text, or named texts, in tokenizer_config.json."""
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    for source in ("{{ 'x' }}", [{"name": "tool_use", "template": "{{ 'y' }}"}, {"name": "default", "template": "x"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
        template = Tokenizer(tmp_path).chat_template
        assert template is not None
        assert template.render([]) == "x"


def test_no_template_is_said_so(sentencepiece: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        sentencepiece.apply_chat_template(CONVERSATIONS[0])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append({}) }}",  # immutable
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",  # sandboxed
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="refuses these messages"):
        ChatTemplate(source, {}).render(CONVERSATIONS[0])


def test_a_broken_template_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="does not compile"):
        ChatTemplate("{% if %}", {})


def test_a_missing_or_broken_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="not a tokenizer file"):
        Tokenizer(tmp_path)


def test_saved_truncation_and_padding_are_ignored(byte_level_folder: Path, tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(byte_level_folder)
    theirs.backend_tokenizer.enable_truncation(2)
    theirs.backend_tokenizer.enable_padding(length=4)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert [len(tokenizer.encode(text)) for text in ("x", "xyzxyz")] == [1, 6]


def test_token_bytes(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert b"".join(byte_level.token_bytes(token_id) for token_id in byte_level.encode("a é")) == "a é".encode()
    assert byte_level.token_bytes(10_000) == b""
    assert sentencepiece.token_bytes(sentencepiece.backend.token_to_id("▁the")) == b" the"
    assert sentencepiece.token_bytes(sentencepiece.backend.token_to_id("<0xE2>")) == b"\xe2"


@given(st.text())
def test_min_tokens_is_never_more_than_there_are(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.min_tokens(text) <= max(1, len(byte_level.encode(text, add_special_tokens=False)))


def test_min_tokens_grows_with_the_text_where_tokens_are_bounded(
    byte_level: Tokenizer, sentencepiece: Tokenizer
) -> None:
    assert byte_level.min_tokens("é" * 10_000) > 100
    assert sentencepiece.min_tokens("é" * 10_000) == 1  # unknown characters may become one token
