"""The committed protobuf code is what protoc makes of the committed `.proto` files."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("grpc_tools", reason="grpcio-tools (extra dev) generates the code")

PROTOS = Path(__file__).parents[2] / "protos"


def test_committed_code_is_fresh(tmp_path: Path) -> None:
    runpy.run_path(str(PROTOS / "generate.py"))["generate"](tmp_path)

    generated = {path.name: path.read_text() for path in (tmp_path / "peftserve_proto" / "v1").iterdir()}
    committed = {
        path.name: path.read_text()
        for path in (PROTOS / "peftserve_proto" / "v1").glob("*_pb2*")
        if path.suffix in (".py", ".pyi")
    }

    assert len(generated) == 8
    stale = sorted(name for name in generated.keys() | committed.keys() if generated.get(name) != committed.get(name))
    assert not stale, f"run `python protos/generate.py`; stale: {stale}"
