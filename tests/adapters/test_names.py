import pytest

from peftserve.adapters.names import check_name, not_found, split_reference
from peftserve.errors import AdapterNotFoundError, InvalidRequestError


@pytest.mark.parametrize("name", ["a", "0", "my-adapter_2.1", "x" * 64])
def test_good_names(name: str) -> None:
    check_name(name, ())
    assert split_reference(name) == (name, None)


@pytest.mark.parametrize("name", ["", "A", "-a", ".", "..", "a/b", "a@b", "a b", "x" * 65, "ä", "a\n", "../../etc"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a valid name: 1 to 64 lower-case letters") as caught:
        check_name(name, ())
    assert caught.value.field == "adapter_id"


def test_the_base_models_name_is_taken() -> None:
    with pytest.raises(InvalidRequestError, match="adapter_id 'base' is the base model's name"):
        check_name("base", {"base"})


def test_exact_versions() -> None:
    assert split_reference(f"a@sha256:{'0f' * 32}") == ("a", "0f" * 32)
    for version in ("", "sha256:", "0" * 64, "sha256:" + "0" * 63, "sha256:" + "G" * 64, "sha512:" + "0" * 64):
        with pytest.raises(AdapterNotFoundError, match="names no adapter version"):
            split_reference(f"a@{version}")


def test_similar_names() -> None:
    error = not_found("sentimant", ["sentiment", "sentiment-2", "translate", "summary"])
    assert error.message == "no adapter is called 'sentimant'; similar names: sentiment, sentiment-2"
    assert not_found("q", ["sentiment"]).message == "no adapter is called 'q'"
    assert len(not_found("a1", [f"a{i}" for i in range(20)]).message.split(",")) == 5
    assert len(not_found("x" * 100_000, ["y"]).message) < 300
