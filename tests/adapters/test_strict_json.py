import pytest

from peftserve.adapters.strict_json import MAX_DEPTH, parse_object


def test_keeps_the_order_of_keys() -> None:
    assert list(parse_object(b'{"b": 1, "a": [1.5, true, null], "c": {}}')) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
        (b'{"x": {"a": 1, "a": 1}}', "the key 'a' appears twice"),
        (b"[1]", "the top level must be an object, not a list"),
        (b"3", "the top level must be an object, not a number"),
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1}x', "not JSON: Extra data"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "the number 1e999 is out of range"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": ' + b"[" * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"nested deeper than {MAX_DEPTH} levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_refuses(data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_object(data)
    assert message in str(caught.value)


def test_accepts_the_deepest_nesting() -> None:
    assert parse_object(b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")
