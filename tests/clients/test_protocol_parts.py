"""The parts without I/O: event streams, request bodies, adapter folders, the error table, the retry policy."""

from itertools import pairwise
from pathlib import Path

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

import peftserve_client as pc
from peftserve import errors as server_errors
from peftserve_client import errors, sse
from peftserve_client.adapter_files import AdapterFiles
from peftserve_client.request import GenerateOptions, native_body

STREAM = b': ping\r\ndata: {"a": 1}\r\n\r\nevent: error\ndata: x\ndata: y\n\nid: 3\n\ndata: \xe2\x80\xa8\xc2\x85\n\n'
EVENTS = [
    sse.Event("message", b'{"a": 1}'),
    sse.Event("error", b"x\ny"),
    sse.Event("message", "\u2028\u0085".encode()),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_arrive(cuts: list[int]) -> None:
    decoder = sse.Decoder()
    borders = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(borders)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == EVENTS


def test_an_endless_event_is_refused() -> None:
    decoder = sse.Decoder()
    chunk = b"data: " + b"x" * 2**20

    def read() -> None:
        for _ in range(20):
            list(decoder.feed(chunk))

    with pytest.raises(pc.ProtocolError, match="event of more than"):
        read()


def test_the_body_has_what_was_given_and_nothing_else() -> None:
    options = GenerateOptions(adapter_id="law", stop="x", logit_bias={3: 1.0}, temperature=0.0, timeout_s=3)
    assert native_body("hi", options) == {
        "prompt": "hi",
        "adapter_id": "law",
        "sampling": {"stop": ["x"], "logit_bias": {3: 1.0}, "temperature": 0.0},
    }
    assert native_body([1, 2], {}) == {"token_ids": [1, 2]}
    turn = pc.Message(role="user", content="hi")
    assert native_body([turn], {}) == {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(TypeError, match="text, token ids"):
        native_body(["a", "b"], {})  # type: ignore[arg-type]


def test_every_code_of_the_server_has_a_class() -> None:
    at_start_only = {"configuration", "unsupported_model"}
    for code in server_errors.ERRORS_BY_CODE.keys() - at_start_only:
        assert errors.api_error_class(code, 500).default_code == code
    assert errors.api_error_class("from_a_newer_server", 404) is errors.NotFoundError
    assert errors.api_error_class("", "UNAVAILABLE") is errors.UnavailableError
    assert errors.api_error_class("", 418) is errors.ApiError


class TestFolders:
    def test_names_of_peft_and_adapterhub(self, tmp_path: Path) -> None:
        for name in ("adapter.safetensors", "adapter_model.safetensors"):
            (tmp_path / "adapter_config.json").write_text("{}")
            (tmp_path / name).write_text(name)
            assert AdapterFiles.read(tmp_path).open().read() == name.encode()

    def test_the_models_head_is_no_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "model_head.safetensors").write_text("head")
        (tmp_path / "my.safetensors").write_text("adapter")
        assert AdapterFiles.read(tmp_path).open().read() == b"adapter"

    def test_what_is_wrong_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(pc.AdapterFilesError, match="no such folder"):
            AdapterFiles.read(tmp_path / "nowhere")
        with pytest.raises(pc.AdapterFilesError, match=r"no adapter_model\.safetensors"):
            AdapterFiles.read(tmp_path)
        (tmp_path / "adapter_model.bin").touch()
        with pytest.raises(pc.AdapterFilesError, match="is a pickle"):
            AdapterFiles.read(tmp_path)
        (tmp_path / "a.safetensors").touch()
        with pytest.raises(pc.AdapterFilesError, match=r"adapter_config\.json"):
            AdapterFiles.read(tmp_path)
        (tmp_path / "b.safetensors").touch()
        with pytest.raises(pc.AdapterFilesError, match=r"a\.safetensors, b\.safetensors"):
            AdapterFiles.read(tmp_path)

    def test_progress_counts_the_config_too(self) -> None:
        seen: list[tuple[int, int]] = []
        with AdapterFiles.read((b"12345", b"x" * 10)).open(lambda *step: seen.append(step)) as reader:
            assert b"".join(reader.chunks(4)) == b"x" * 10
        assert seen == [(9, 15), (13, 15), (15, 15), (15, 15)]


class TestRetryPolicy:
    def wait(self, error: Exception, attempt: int) -> float:
        policy = pc.RetryPolicy(first_wait_s=1.0, max_wait_s=5.0)
        state = tenacity.RetryCallState(policy.sync(), None, (), {})
        state.attempt_number = attempt
        state.set_exception((type(error), error, None))
        return float(policy.sync().wait(state))

    def test_backoff_grows_with_jitter_up_to_its_cap(self) -> None:
        error = pc.ConnectionFailedError("x")
        for attempt, most in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (9, 5.0)):
            waits = [self.wait(error, attempt) for _ in range(50)]
            assert 0 <= min(waits) < most / 2 < max(waits) <= most

    def test_the_servers_word_goes_before_backoff(self) -> None:
        error = pc.OverloadedError("x", status=429, retry_after_s=3.0)
        assert all(3.0 <= self.wait(error, attempt) <= 3.3 for attempt in (1, 2, 3))
