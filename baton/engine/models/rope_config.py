"""Rotary embedding in a config.json: `rope_theta` beside `rope_scaling`, or all of it inside `rope_parameters`.

Where both forms are given, a `rope_scaling` that is not empty wins, and inside either a key wins over its twin at the
top, as in transformers.
"""

from __future__ import annotations

from baton.engine.layers.rope import LinearScaling, Llama3Scaling, RopeScaling
from baton.engine.models.fields import Content, fault, positive, size

SUPPORTED = "default, linear, llama3"
_KNOWN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LLAMA3 = frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
_OF_TYPE = {"default": frozenset[str](), "linear": frozenset({"factor"}), "llama3": _LLAMA3}


def read_rope(content: Content) -> tuple[float, RopeScaling | None]:
    """Base and scaling. Raises ConfigError naming the key at fault."""
    _refuse_partial(content, "")
    theta = positive(content, "rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise fault(key, f"must be an object, got {rope!r}")
        if rope:
            return positive(rope, "rope_theta", theta, f"{key}."), _read_scaling(rope, key, content)
    return theta, None


def _read_scaling(rope: Content, key: str, content: Content) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in _OF_TYPE:
        raise fault(f"{key}.rope_type", f"{kind!r} is not supported; supported: {SUPPORTED}")
    prefix = f"{key}."
    _refuse_partial(rope, prefix)
    unknown = sorted(k for k, value in rope.items() if value is not None and k not in _KNOWN | _OF_TYPE[kind])
    if unknown:
        raise fault(prefix + unknown[0], f"is not supported with rope type {kind!r}")
    match kind:
        case "linear":
            return LinearScaling(positive(rope, "factor", None, prefix))
        case "llama3":
            return _read_llama3(rope, prefix, content)
    return None


def _read_llama3(rope: Content, prefix: str, content: Content) -> Llama3Scaling:
    low, high = (positive(rope, f"{name}_freq_factor", None, prefix) for name in ("low", "high"))
    if high <= low:
        raise fault(f"{prefix}high_freq_factor", f"{high} must be more than low_freq_factor {low}")
    name = "original_max_position_embeddings"
    inner = size(rope, name, size(content, "max_position_embeddings"), prefix)
    return Llama3Scaling(positive(rope, "factor", None, prefix), low, high, size(content, name, inner))


def _refuse_partial(content: Content, prefix: str) -> None:
    if content.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise fault(
            f"{prefix}partial_rotary_factor", f"{content['partial_rotary_factor']} is not supported; supported: 1"
        )
