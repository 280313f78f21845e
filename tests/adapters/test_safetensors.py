import io
import json
import pickle
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from peftserve.adapters import safetensors
from peftserve.adapters.safetensors import TensorView, read
from peftserve.errors import InvalidAdapterError
from tests.adapters.files import raw_safetensors

VALID = save(
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), np.float16)}, metadata={"format": "pt"}
)


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidAdapterError) as caught:
        read(data)
    assert caught.value.faults
    return caught.value.message


def test_reads_what_the_reference_writes() -> None:
    tensors = read(VALID)
    assert tensors.keys() == {"a", "b"}
    assert (tensors["a"].dtype, tensors["a"].shape, tensors["a"].nbytes) == ("F32", (2, 3), 24)
    np.testing.assert_array_equal(tensors["a"].float32(), np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(tensors["b"].float32(), np.ones(4, np.float32))


def test_bfloat16_is_exact_and_float32_is_the_callers_own() -> None:
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    # One leading pad byte in the header leaves the data at an odd address.
    data = raw_safetensors(b" " + json.dumps({"x": entry("BF16", [2, 2], 0, 8)}).encode(), bits)
    with pytest.raises(InvalidAdapterError):
        read(data[:-1])
    result = read(data)["x"].float32()
    np.testing.assert_array_equal(result, values.reshape(2, 2))
    assert result.flags.writeable
    assert result.flags.aligned


def test_scalars_and_empty_tensors_are_fine() -> None:
    tensors = read(raw_safetensors({"s": entry("F32", [], 0, 4), "e": entry("F16", [0, 7], 4, 4)}, b"\0" * 4))
    assert tensors["s"].float32().shape == ()
    assert tensors["e"].float32().shape == (0, 7)
    assert tensors["e"].num_not_finite() == 0
    assert read(raw_safetensors({})) == {}


def test_a_pickle_is_called_a_pickle() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": 1}))
    text = refusal(archive.getvalue())
    assert "a PyTorch checkpoint (a zip with a pickle in it), not safetensors" in text
    assert "pickles can run code and are never read" in text
    for protocol in (2, 4, 5):
        assert "the weights are a pickle, not safetensors" in refusal(pickle.dumps({"x": [1.0] * 50}, protocol))


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle() -> None:
    header = {"x": entry("F32", [1], 0, 4), "__metadata__": {"pad": ""}}
    missing = 0x280 - len(json.dumps(header))
    header["__metadata__"]["pad"] = "x" * missing
    data = raw_safetensors(header, b"\0" * 4)
    assert data[:2] == b"\x80\x02"
    assert read(data)["x"].shape == (1,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the weights file is empty"),
        (b"abc", "3 bytes, shorter than any header"),
        (b"GGUF" + b"\0" * 60, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (raw_safetensors({}, announce=1 << 62), f"announced, the limit is {safetensors.MAX_HEADER_BYTES}"),
        (raw_safetensors({}, announce=safetensors.MAX_HEADER_BYTES + 1), "announced, the limit is"),
        (raw_safetensors({}, announce=1000), "ends within its header: 1000 bytes are announced, 2 are there"),
        (raw_safetensors(b"[]"), "header is broken: the top level must be an object"),
        (raw_safetensors(b'{"x": 1, "x": 2}'), "header is broken: the key 'x' appears twice"),
        (raw_safetensors(b"{" * 50), "header is broken: not JSON"),
        (raw_safetensors({"x": 3}), "tensor 'x': the safetensors header must give dtype, shape and data_offsets"),
        (raw_safetensors({"x": entry("F32", [1], 0, 4) | {"more": 1}}, b"\0" * 4), "and nothing else"),
        (raw_safetensors({"x": entry("F64", [1], 0, 8)}, b"\0" * 8), "tensor 'x': dtype 'F64' is not supported"),
        (raw_safetensors({"x": entry("I8", [1], 0, 1)}, b"\0"), "dtype 'I8' is not supported; save it as F32"),
        (raw_safetensors({"x": entry(["F32"], [1], 0, 4)}, b"\0" * 4), "is not supported"),
        (raw_safetensors({"x": entry("F32", [-1], 0, 4)}, b"\0" * 4), "shape must be a list of at most 8 sizes"),
        (raw_safetensors({"x": entry("F32", [True], 0, 4)}, b"\0" * 4), "shape must be a list of at most 8 sizes"),
        (raw_safetensors({"x": entry("F32", [1] * 9, 0, 4)}, b"\0" * 4), "shape must be a list of at most 8 sizes"),
        (raw_safetensors({"x": entry("F32", [1.0], 0, 4)}, b"\0" * 4), "shape must be a list of at most 8 sizes"),
        (raw_safetensors({"x": entry("F32", [1], 4, 0)}, b"\0" * 4), "[begin, end] with begin <= end"),
        (
            raw_safetensors({"x": entry("F32", [2], 0, 4)}, b"\0" * 4),
            "F32 of shape [2] takes 8 bytes, but data_offsets",
        ),
        # 2^32 * 2^32 * 4 wraps to 0 in 64 bits.
        (raw_safetensors({"x": entry("F32", [2**32, 2**32], 0, 0)}), "takes 73786976294838206464 bytes"),
        (raw_safetensors({"x": entry("F32", [1], 0, 4)}, b"\0" * 3), "cut off: its header describes 4 bytes"),
        (raw_safetensors({"x": entry("F32", [1], 0, 4)}, b"\0" * 5), "has 1 bytes after its last tensor"),
        (
            raw_safetensors({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 0, 4)}, b"\0" * 8),
            "tensor 'y': its data overlap another tensor's",
        ),
        (
            raw_safetensors({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 8, 12)}, b"\0" * 12),
            "tensor 'y': bytes 4 to 8 before it belong to no tensor",
        ),
        (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
        (raw_safetensors({"__metadata__": []}), "__metadata__ must map strings to strings"),
        (raw_safetensors({"__metadata__": {str(i): "" for i in range(1001)}}), "__metadata__ has 1001 entries"),
        (raw_safetensors({"n" * 513: entry("F32", [], 0, 4)}, b"\0" * 4), "1 to 512 printable characters"),
        (raw_safetensors({"a\nb": entry("F32", [], 0, 4)}, b"\0" * 4), "tensor 'a\\nb': the name must have"),
        (raw_safetensors({"": entry("F32", [], 0, 4)}, b"\0" * 4), "tensor '': the name must have"),
    ],
)
def test_refuses(data: bytes, message: str) -> None:
    assert message in refusal(data)


def test_all_faults_of_a_header_are_listed() -> None:
    header = {f"t{i}": entry("F64", [1], 0, 8) for i in range(60)} | {"ok": entry("F32", [1], 0, 4)}
    with pytest.raises(InvalidAdapterError) as caught:
        read(raw_safetensors(header, b"\0" * 4))
    assert len(caught.value.faults) == 51
    assert caught.value.faults[-1] == "+10 more"
    assert "adapter refused for 60 faults" in caught.value.message
    assert "+57 more" in caught.value.message


def test_a_header_full_of_empty_tensors_costs_little() -> None:
    """The safetensors bomb: a legal header of very many empty tensors. Ours ends at 1 MiB and 10,000 tensors."""
    header = json.dumps({f"{i}": entry("F32", [0], 0, 0) for i in range(17_000)}, separators=(",", ":")).encode()
    assert len(header) < safetensors.MAX_HEADER_BYTES
    tracemalloc.start()
    try:
        assert "holds 17000 tensors, the limit is 10000" in refusal(raw_safetensors(header))
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_counts_what_is_not_finite(dtype: str, bad: float) -> None:
    values = np.zeros(2_500_000, np.float32)
    values[[0, 1_048_575, 1_048_576, 2_499_999]] = bad
    values[5] = np.finfo(np.float16).max
    if dtype == "BF16":
        raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        raw = values.astype("<f4" if dtype == "F32" else "<f2").tobytes()
    view = TensorView(dtype, values.shape, memoryview(raw))
    tracemalloc.start()
    try:
        assert view.num_not_finite() == 4
        assert tracemalloc.get_traced_memory()[1] < 9 * 2**20
    finally:
        tracemalloc.stop()


def test_view_of_an_array() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    view = TensorView.from_array(array.T)
    assert view.shape == (2, 3)
    np.testing.assert_array_equal(view.float32(), array.T)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutations_are_parsed_or_refused_and_nothing_else(data: st.DataObject) -> None:
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        where = data.draw(st.integers(0, max(0, len(mutated) - 1)))
        if kind == "set" and mutated:
            mutated[where] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            mutated[where:where] = data.draw(st.binary(min_size=1, max_size=12))
        elif kind == "delete":
            del mutated[where : where + data.draw(st.integers(1, 12))]
        else:
            del mutated[where:]
    _parsed_or_refused(bytes(mutated))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    _parsed_or_refused(data)


_sizes = st.one_of(st.integers(-2, 12), st.integers(2**31, 2**70), st.none(), st.floats(), st.text(max_size=2))
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "X", 3]),
        "shape": st.lists(_sizes, max_size=3),
        "data_offsets": st.lists(_sizes, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4), _entries, max_size=4), st.binary(max_size=40))
def test_any_header_is_parsed_or_refused(header: dict[str, Any], body: bytes) -> None:
    _parsed_or_refused(raw_safetensors(header, body))


def _parsed_or_refused(data: bytes) -> None:
    try:
        tensors = read(data)
    except InvalidAdapterError:
        return
    for tensor in tensors.values():
        assert tensor.float32().shape == tensor.shape
        assert tensor.num_not_finite() <= tensor.nbytes
