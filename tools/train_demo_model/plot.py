"""Command: draws the loss curve of training.json as an SVG file.

python tools/train_demo_model/plot.py baton/demo_model/training.json baton/demo_model/loss.svg
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 56, 20, 16, 44
LINES = (("train_loss", "#1f6fb2", "training"), ("val_loss", "#c2571a", "held out"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    curve = json.loads(arguments.training.read_text(encoding="utf-8"))["curve"]
    arguments.svg.write_text(draw(curve), encoding="utf-8")


def draw(curve: list[dict[str, float]]) -> str:
    """An SVG document: loss in nats per token over millions of tokens, with a line for each of LINES."""
    losses = [point[name] for point in curve for name, _, _ in LINES]
    low, high = math.floor(min(losses)), math.ceil(max(losses))
    last = max(point["tokens"] for point in curve)

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [_tick_y(loss, y(loss)) for loss in range(low, high + 1)]
    parts += [_tick_x(last * share / 4, x(last * share / 4)) for share in range(5)]
    for index, (name, colour, label) in enumerate(LINES):
        points = " ".join(f"{x(point['tokens']):.1f},{y(point[name]):.1f}" for point in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(WIDTH - RIGHT - 8, TOP + 16 + 18 * index, label, "end", colour))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "million tokens", "middle"))
    parts.append(_text(8, 14, "loss (nats per token)", "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def _tick_y(loss: float, at: float) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
    return line + _text(LEFT - 8, at + 4, f"{loss:g}", "end")


def _tick_x(tokens: float, at: float) -> str:
    return _text(at, HEIGHT - BOTTOM + 18, f"{tokens / 1e6:.0f}", "middle")


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    main()
