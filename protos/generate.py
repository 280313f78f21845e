"""Writes the Python code and type stubs of the `.proto` files beside them: `python protos/generate.py [folder]`.

Needs grpcio-tools and mypy-protobuf (extra `dev`). With a folder, writes there instead; the test that the committed
code is fresh uses this.
"""

import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("peftserve_proto/v1/inference.proto", "peftserve_proto/v1/adapters.proto")


def generate(out: Path) -> None:
    """Generates `*_pb2.py`, `*_pb2_grpc.py` and their stubs under `out`. Raises `SystemExit` when protoc fails."""
    from grpc_tools import protoc

    scripts = Path(sysconfig.get_path("scripts"))
    arguments = [
        "protoc",
        f"--proto_path={HERE}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        *(f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        *SOURCES,
    ]
    if code := protoc.main(arguments):
        raise SystemExit(code)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
