"""Writes what the trained model says to a few prompts; `train.py` calls `write_samples` at its end.

As a command it does so for a checkpoint on the CPU: python tools/train_demo_model/samples.py baton/demo_model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from checkpoint import EOS_ID
from model import DemoModel, Shape
from safetensors.torch import load_file
from tokenizers import Tokenizer

PROMPTS = (
    "dog:",
    "river:",
    "A baton is a short stick",
    "To run is to",
    "The runner hands it over without slowing down, and the next one is already moving.",
    "Paris is",
    "### user\nWhat is a telescope?\n### assistant\n",
    "### user\nWhat is the opposite of good?\n### assistant\n",
    '### user\nUse "water" in a sentence.\n### assistant\n',
    "### user\nHello!\n### assistant\n",
)
MAX_TOKENS = 60
TEMPERATURE = 0.7


def write_samples(file: Path, model: DemoModel, tokenizer_file: Path, device: torch.device) -> None:
    """Every prompt once greedily and once drawn at a temperature of 0.7."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    generator = torch.Generator(device).manual_seed(0)
    blocks: list[str] = []
    for prompt in PROMPTS:
        for name, draws in (("greedy", None), (f"temperature {TEMPERATURE}", generator)):
            text = _continue(model, tokenizer, prompt, device, draws)
            blocks.append(f"[{name}] {prompt}»{text}")
    file.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


@torch.no_grad()
def _continue(
    model: DemoModel, tokenizer: Tokenizer, prompt: str, device: torch.device, draws: torch.Generator | None
) -> str:
    ids: list[int] = tokenizer.encode(prompt).ids
    start = len(ids)
    while len(ids) - start < MAX_TOKENS and ids[-1] != EOS_ID:
        logits = model(torch.tensor([ids], device=device))[0, -1].float()
        if draws is None:
            ids.append(int(logits.argmax()))
        else:
            ids.append(int(torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=draws)))
    continuation: str = tokenizer.decode(ids[start:], skip_special_tokens=False)
    return continuation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    model = DemoModel(Shape())
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    write_samples(folder / "samples.txt", model, folder / "tokenizer.json", torch.device("cpu"))


if __name__ == "__main__":
    main()
