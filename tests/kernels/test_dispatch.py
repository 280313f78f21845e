from collections.abc import Iterator

import pytest
import torch

from peftserve_kernels.dispatch import ENVIRONMENT_VARIABLE, Backend, backend_for, forced_backend, select

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def reference() -> str:
    return "reference"


def native() -> str:
    return "native"


def triton() -> str:
    return "triton"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    forced_backend.cache_clear()
    yield
    forced_backend.cache_clear()


def test_the_device_chooses() -> None:
    table = {Backend.REFERENCE: reference, Backend.CPU: native, Backend.TRITON: triton}
    assert select(table, CPU)() == "native"
    assert select(table, CUDA)() == "triton"


def test_a_missing_implementation_falls_back_to_the_reference() -> None:
    assert select({Backend.REFERENCE: reference, Backend.TRITON: triton}, CPU)() == "reference"
    assert select({Backend.REFERENCE: reference, Backend.CPU: native}, CUDA)() == "reference"


@pytest.mark.parametrize("forced", list(Backend))
def test_the_environment_forces_one_for_every_device(monkeypatch: pytest.MonkeyPatch, forced: Backend) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, forced.value)
    assert backend_for(CPU) is backend_for(CUDA) is forced


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_for(CPU) is Backend.CPU
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert backend_for(CPU) is Backend.CPU


def test_an_unknown_backend_is_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"PEFTSERVE_KERNELS='cuda': must be one of reference, cpu, triton"):
        backend_for(CPU)
