"""Bodies: bounds, unknown fields, and messages that name field and limit."""

import json
from typing import Any

import pytest

from peftserve.api.http.openai_schemas import ChatCompletionBody, CompletionBody
from peftserve.api.parse import MAX_FAULTS, MAX_NODES, parse_body
from peftserve.api.request import ChatPrompt, GenerateRequest, TextPrompt, TokenPrompt
from peftserve.api.schemas import MAX_TOKENS, GenerateBody
from peftserve.errors import InvalidRequestError

BASE = "tiny-base"


def faults(model: type[Any], body: Any) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(model, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.faults
    return caught.value.faults


def sampling(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", "sampling": fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "sampling.max_tokens: must be greater than or equal to 1 (got -1)"),
        ({"max_tokens": True}, "sampling.max_tokens: must be a valid integer (got True)"),
        ({"max_tokens": 2**21}, "sampling.max_tokens: must be less than or equal to 1048576 (got 2097152)"),
        ({"temperature": 2.5}, "sampling.temperature: must be less than or equal to 2 (got 2.5)"),
        ({"temperature": "1"}, "sampling.temperature: must be a valid number (got '1')"),
        ({"top_p": 0}, "sampling.top_p: must be greater than 0 (got 0)"),
        ({"min_p": -0.1}, "sampling.min_p: must be greater than or equal to 0 (got -0.1)"),
        ({"n": 129}, "sampling.n: must be less than or equal to 128 (got 129)"),
        ({"seed": 2**63}, f"sampling.seed: must be less than {2**63} (got {2**63})"),
        ({"seed": -(2**63) - 1}, f"sampling.seed: must be greater than or equal to {-(2**63)} (got {-(2**63) - 1})"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty: must be greater than 0 (got 0)"),
        ({"presence_penalty": 3}, "sampling.presence_penalty: must be less than or equal to 2 (got 3)"),
        (
            {"logit_bias": {"5": 1, "05": 2}},
            "sampling.logit_bias: '05' is no token id; write it in digits, without anything before or after",
        ),
        ({"logit_bias": {"5": 101}}, "sampling.logit_bias.5: must be less than or equal to 100 (got 101)"),
        ({"stop": [""]}, "sampling.stop.0: String should have at least 1 character (got '')"),
        ({"stop_token_ids": [-1]}, "sampling.stop_token_ids.0: must be greater than or equal to 0 (got -1)"),
        ({"logprobs": 101}, "sampling.logprobs: must be less than or equal to 100 (got 101)"),
        ({"temprature": 1}, "sampling.temprature: no such field; did you mean temperature?"),
    ],
)
def test_sampling_bounds(fields: dict[str, Any], message: str) -> None:
    assert faults(GenerateBody, sampling(**fields)) == [message]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(number: str) -> None:
    body = f'{{"prompt": "x", "sampling": {{"temperature": {number}}}}}'.encode()
    assert "temperature" in faults(GenerateBody, body)[0]


def test_all_faults_come_at_once() -> None:
    found = faults(GenerateBody, {"prompt": "x", "adapter": "a", "sampling": {"top_k": -2, "top_p": 1.5}})
    assert [fault.partition(":")[0] for fault in found] == ["sampling.top_k", "sampling.top_p", "adapter"]
    assert found[-1] == "adapter: no such field; did you mean adapter_id?"


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "token_ids": [1]}, {"prompt": "x", "messages": []}])
def test_exactly_one_prompt(body: dict[str, Any]) -> None:
    assert any("exactly one" in fault or "at least 1 item" in fault for fault in faults(GenerateBody, body))


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'"x"', b"null"])
def test_not_an_object(body: bytes) -> None:
    assert len(faults(GenerateBody, body)) == 1


def test_long_inputs_are_not_echoed() -> None:
    assert len(faults(GenerateBody, sampling(temperature="x" * 10_000))[0]) < 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"token_ids": [-1] * 1000}, "token_ids.0: must be greater than or equal to 0 (got -1)"),
        ({"messages": [7] * 1000}, "messages.0: must be an object (got 7)"),
        (
            {"messages": [{"role": "user", "content": [7] * 1000}]},
            "messages.0.content.0: must be an object (got 7)",
        ),
        (sampling(stop=[""] * 64), "sampling.stop.0: String should have at least 1 character (got '')"),
        (
            sampling(logit_bias={str(i): 1e9 for i in range(2000)}),
            "sampling.logit_bias: 2000 entries, and the limit is 1024",
        ),
        ({"token_ids": [1] * (MAX_TOKENS + 1)}, "token_ids: List should have at most 1048576 items"),
    ],
)
def test_a_large_bad_body_has_one_fault(body: dict[str, Any], message: str) -> None:
    [fault] = faults(GenerateBody, body)
    assert fault.startswith(message)


def test_only_the_first_faults_are_written_out() -> None:
    found = faults(GenerateBody, {"prompt": "x"} | {f"k{i}": i for i in range(1000)})
    assert len(found) == MAX_FAULTS + 1
    assert found[-1] == f"and {1000 - MAX_FAULTS} more faults"


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({"prompt": "x", "sampling": {f"k{i}": 0 for i in range(MAX_NODES)}}).encode(),
        json.dumps({"prompt": "x", "k": {f'"\\":{i}': ":" for i in range(MAX_NODES)}}).encode(),
        b'{"prompt": ' + b"[" * 2 * MAX_NODES,
        json.dumps({"token_ids": [[]] * MAX_NODES}).encode(),
        json.dumps({"prompt": "[[[" * MAX_NODES, "stop": ["a"] * 4 * MAX_NODES}).encode(),
    ],
)
def test_no_more_structure_than_any_real_body_has(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_NODES} fields, lists and objects"):
        parse_body(GenerateBody, raw)


def test_texts_may_hold_any_number_of_brackets_and_quotes() -> None:
    text = '{"a": [1, "b\\\\"]}' * MAX_NODES
    assert parse_body(GenerateBody, json.dumps({"prompt": text}).encode()).prompt == text


def test_stop_may_be_one_string_and_bias_keys_are_ids() -> None:
    body = parse_body(GenerateBody, json.dumps(sampling(stop="\n", logit_bias={"7": -1})).encode())
    assert body.sampling.stop == ["\n"]
    assert body.sampling.logit_bias == {7: -1.0}


def test_native_request() -> None:
    body = GenerateBody(token_ids=[1, 2], adapter_id="a")
    request = GenerateRequest.from_body(body, request_id="r", tenant="t", timeout_s=3.0)
    assert request.prompts == (TokenPrompt((1, 2)),)
    assert (request.adapter_id, request.prompt_field, request.timeout_s) == ("a", "token_ids", 3.0)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], **fields}


def to_request(body: dict[str, Any]) -> GenerateRequest:
    model: type[ChatCompletionBody] | type[CompletionBody] = (
        ChatCompletionBody if "messages" in body else CompletionBody
    )
    return parse_body(model, json.dumps(body).encode()).to_request(id_="r", tenant="t", base=BASE)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"tools": None, "stop": None, "n": None, "seed": None, "temperature": None, "logit_bias": None, "audio": None},
        {"n": 2, "best_of": 2},
    ],
)
def test_what_asks_for_nothing_is_ignored(fields: dict[str, Any]) -> None:
    assert to_request(chat(**fields)).prompts == to_request(chat()).prompts


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"audio": {"voice": "x"}},
        {"reasoning_effort": "high"},
        {"best_of": 2},
        {"echo": True},
        {"suffix": "x"},
        {"guided_json": {}},
        {"chat_template": "{{ 7 * 7 }}"},
    ],
)
def test_what_changes_the_answer_is_refused_by_name(fields: dict[str, Any]) -> None:
    assert faults(ChatCompletionBody, chat(**fields)) == [f"not supported by this server: {', '.join(fields)}"]


def test_unknown_fields_are_refused_also_when_null() -> None:
    assert faults(ChatCompletionBody, chat(temprature=None)) == ["temprature: no such field; did you mean temperature?"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options is only for stream"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "they differ"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ],
)
def test_chat_consistency(fields: dict[str, Any], word: str) -> None:
    assert any(word in fault for fault in faults(ChatCompletionBody, chat(**fields)))


def test_chat_request() -> None:
    request = to_request(chat(logprobs=True, top_logprobs=3, max_completion_tokens=5, temperature=0))
    assert (request.sampling.logprobs, request.sampling.max_tokens, request.sampling.temperature) == (3, 5, 0.0)
    assert request.default_max_tokens is None
    assert to_request(chat(logprobs=True)).sampling.logprobs == 0
    assert to_request(chat()).sampling.logprobs is None


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    request = to_request(chat(messages=[{"role": "developer", "content": parts}, answer]))
    assert isinstance(request.prompts[0], ChatPrompt)
    assert [message.for_template() for message in request.prompts[0].messages] == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", (TextPrompt("a"),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1], [2, 3]], (TokenPrompt((1,)), TokenPrompt((2, 3)))),
    ],
)
def test_completion_prompts(prompt: Any, expected: Any) -> None:
    request = to_request({"model": BASE, "prompt": prompt})
    assert request.prompts == expected
    assert request.default_max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt: Field required"),
        (7, "prompt: must be a text, a list of texts, a list of token ids, or a list of such lists (got 7)"),
        ([True], "prompt.0: must be a valid integer (got True)"),
        ([1, "a"], "prompt.1: must be a valid integer (got 'a')"),
        (["a", 1], "prompt.1: must be a valid string (got 1)"),
        ([[1], [2, -3]], "prompt.1.1: must be greater than or equal to 0 (got -3)"),
        ([""] * 5000, "prompt: List should have at most 4096 items after validation, not 5000 (got list)"),
    ],
)
def test_a_bad_completion_prompt_has_one_fault(prompt: Any, message: str) -> None:
    assert faults(CompletionBody, {"model": BASE, "prompt": prompt}) == [message]


def test_an_empty_list_of_prompts() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        to_request({"model": BASE, "prompt": []})


@pytest.mark.parametrize(
    ("model", "adapter_id", "expected", "field"),
    [
        (BASE, None, None, "adapter_id"),
        (BASE, "a", "a", "adapter_id"),
        ("a", None, "a", "model"),
        ("a", "a", "a", "model"),
    ],
)
def test_model_or_adapter_id(model: str, adapter_id: str | None, expected: str | None, field: str) -> None:
    request = to_request(chat(model=model, adapter_id=adapter_id))
    assert (request.adapter_id, request.adapter_field) == (expected, field)


def test_two_different_adapters() -> None:
    with pytest.raises(InvalidRequestError, match="names another adapter") as caught:
        to_request(chat(model="a", adapter_id="b"))
    assert caught.value.field == "model"
