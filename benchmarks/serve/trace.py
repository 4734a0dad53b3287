"""Trace files: one JSON object a line with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

Equal hash ids mean equal pieces of 512 prompt tokens, so that prefixes that were shared in production are shared here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from baton.common.errors import ConfigError
from benchmarks.serve.tokens import Domain, TokenIds, TokenSource

PIECE_TOKENS = 512


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace; `timestamp_ms` counts from the start of the trace."""

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def load_trace(path: Path, limit: int | None) -> list[TraceRow]:
    """The first `limit` rows in file order. Raises ConfigError naming the line for anything that is not a trace."""
    rows: list[TraceRow] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_parse_row(line, f"{path.name}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--trace", f"cannot read {path}: {error}") from error
    if not rows:
        raise ConfigError("--trace", f"{path} holds no request")
    if any(later.timestamp_ms < earlier.timestamp_ms for earlier, later in pairwise(rows)):
        raise ConfigError("--trace", f"{path}: timestamps go back")
    return rows


def _parse_row(line: str, where: str) -> TraceRow:
    try:
        fields = json.loads(line)
        row = TraceRow(
            timestamp_ms=float(fields["timestamp"]),
            input_length=int(fields["input_length"]),
            output_length=int(fields["output_length"]),
            hash_ids=tuple(int(hash_id) for hash_id in fields["hash_ids"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("--trace", f"{where}: not a trace row ({type(error).__name__}: {error})") from error
    if row.input_length < 1 or row.output_length < 1:
        raise ConfigError("--trace", f"{where}: lengths must be at least 1")
    if len(row.hash_ids) * PIECE_TOKENS < row.input_length:
        raise ConfigError("--trace", f"{where}: {len(row.hash_ids)} hash ids cannot fill {row.input_length} tokens")
    return row


def trace_prompt(row: TraceRow, source: TokenSource) -> TokenIds:
    """[input_length]: the pieces of the row's hash ids, one after the other, the last one cut."""
    pieces = [source.draw(Domain.PIECE, hash_id, PIECE_TOKENS) for hash_id in row.hash_ids]
    return np.concatenate(pieces)[: row.input_length]
