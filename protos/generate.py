"""Generates the Python code of the .proto files beside it; `--check` fails when the committed code is stale."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def generate(target: Path) -> None:
    """Write the generated modules and stubs into `target`/protos. Raises RuntimeError when protoc fails."""
    includes = [f"-I{ROOT}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    sources = [str(path.relative_to(ROOT)) for path in sorted(HERE.glob("*.proto"))]
    if protoc.main(["protoc", *includes, *plugins, *outputs, *sources]) != 0:
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
