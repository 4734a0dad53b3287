"""The time below which no engine can be: the sum over a step's operations of what bounds each, memory or arithmetic.

Pure. Bytes and operations are counted for a Llama; every weight and every key and value is read once.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured in the same run. Bytes per second and operations per second."""

    read: float
    matmul: float


class Floors:
    """Seconds of decode steps and prefills of one model. `itemsize`: bytes of a value."""

    def __init__(self, config: ModelConfig, itemsize: int, ceilings: Ceilings) -> None:
        self._config = config
        self._itemsize = itemsize
        self._ceilings = ceilings

    @property
    def weight_bytes(self) -> int:
        """Without the input embedding, of which a step reads a few rows."""
        c = self._config
        products = c.num_layers * sum(rows * columns for rows, columns in self._products())
        return self._itemsize * (products + c.vocab_size * c.hidden_size)

    def decode(self, batch: int, context: int) -> float:
        """One step of `batch` sequences with `context` tokens each."""
        c = self._config
        kv_bytes = 2 * batch * context * c.kv_size * self._itemsize
        attention = self._bound(kv_bytes, 4 * batch * context * c.q_size)
        return self._layers(batch, attention) + self._product(c.vocab_size, c.hidden_size, batch)

    def prefill(self, num_tokens: int) -> float:
        """One prompt, logits of its last token only."""
        c = self._config
        kv_bytes = 2 * num_tokens * c.kv_size * self._itemsize
        attention = self._bound(kv_bytes, 2 * num_tokens * (num_tokens + 1) * c.q_size)
        return self._layers(num_tokens, attention) + self._product(c.vocab_size, c.hidden_size, 1)

    def _layers(self, rows: int, attention: float) -> float:
        products = sum(self._product(out, inner, rows) for out, inner in self._products())
        return self._config.num_layers * (products + attention)

    def _products(self) -> list[tuple[int, int]]:
        c = self._config
        return [
            (c.q_size + 2 * c.kv_size, c.hidden_size),
            (c.hidden_size, c.q_size),
            (2 * c.intermediate_size, c.hidden_size),
            (c.hidden_size, c.intermediate_size),
        ]

    def _product(self, out_size: int, in_size: int, rows: int) -> float:
        return self._bound(out_size * in_size * self._itemsize, 2 * rows * out_size * in_size)

    def _bound(self, moved: int, operations: int) -> float:
        return max(moved / self._ceilings.read, operations / self._ceilings.matmul)
