"""Generates the Python code of the .proto files beside it; `--check` fails when the committed code is stale."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SERVICES = ("inference", "worker")  # travel over gRPC
MESSAGES = (*SERVICES, "transfer")


def generate(target: Path) -> None:
    """Write the generated modules and stubs into `target`/protos. Raises RuntimeError when protoc fails."""
    includes = [f"-I{ROOT}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    for kinds, names in ((("python", "mypy"), MESSAGES), (("grpc_python", "mypy_grpc"), SERVICES)):
        outputs = [f"--{kind}_out={target}" for kind in kinds]
        if protoc.main(["protoc", *includes, *plugins, *outputs, *(f"protos/{name}.proto" for name in names)]) != 0:
            raise RuntimeError("protoc failed")


def stale() -> list[str]:
    """Names of generated files that differ from what the .proto files give now."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh = {path.name: path.read_bytes() for path in (Path(directory) / "protos").iterdir()}
    committed = {path.name: path.read_bytes() for path in HERE.glob("*_pb2*")}
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if names := stale():
            sys.exit(f"stale generated code: {', '.join(names)}; run `make protos`")
        return
    generate(ROOT)


if __name__ == "__main__":
    main()
