"""Command: WordNet's database files -> text, a tokenizer of its own, and token ids ready for `train.py`.

    python tools/train_demo_model/prepare_data.py --wordnet /usr/share/wordnet --out .train

Writes tokenizer.json, train.bin and val.bin (little-endian uint16 ids) and data.json (what they were made from).
The same input gives the same bytes. One definition in a hundred is held out: val.bin has only those, train.bin none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from checkpoint import BOS, BOS_ID, EOS, EOS_ID
from documents import documents
from model import Shape
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from wordnet import PARTS, load

HELD_OUT = 0.01
BATCH = 4096


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, held_out = _split(arguments.wordnet, arguments.seed, arguments.only_frequent)
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(arguments.out / "tokenizer.json"), pretty=False)
    counts = {
        "train_tokens": _write_ids(arguments.out / "train.bin", train, tokenizer),
        "val_tokens": _write_ids(arguments.out / "val.bin", held_out, tokenizer),
    }
    characters = {"train_characters": sum(map(len, train)), "val_characters": sum(map(len, held_out))}
    sources = {f"data.{part}": _sha256(arguments.wordnet / f"data.{part}") for part in PARTS}
    summary = {
        "documents": len(train),
        **characters,
        **counts,
        "seed": arguments.seed,
        "only_frequent": arguments.only_frequent,
        "sha256": sources,
    }
    (arguments.out / "data.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with <s> (put before every text, as Llama 3 does) and </s>."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=Shape().vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(EOS, "") for text in texts), trainer)
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def _split(folder: Path, seed: int, only_frequent: bool) -> tuple[list[str], list[str]]:
    """Training and held-out documents, each in random order. The held-out synsets depend on the seed alone."""
    net = load(folder)
    rng = random.Random(seed)
    keys = sorted(net)
    held = set(rng.sample(keys, round(HELD_OUT * len(keys))))
    if only_frequent:
        keys = [key for key in keys if net[key].frequent]
        held.intersection_update(keys)
    train = list(documents(net, [key for key in keys if key not in held], rng, entry_passes=1, extra=2))
    held_out = list(documents(net, sorted(held), rng, entry_passes=1, extra=0))
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _write_ids(file: Path, texts: list[str], tokenizer: Tokenizer) -> int:
    """Writes the ids of all documents, each between <s> and </s>; returns how many ids these are."""
    ids = np.concatenate(list(_ids(texts, tokenizer)))
    ids.tofile(file)
    return int(ids.size)


def _ids(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint16]]]:
    for start in range(0, len(texts), BATCH):
        for encoding in tokenizer.encode_batch(texts[start : start + BATCH]):
            yield np.array([*encoding.ids, EOS_ID], dtype="<u2")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of data.noun, index.noun and so on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--only-frequent", action="store_true", help="leave out the rarer meanings (four in five)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
