"""Command: trains the demo model on what `prepare_data.py` wrote and writes a checkpoint, its loss curve and samples.

    python tools/train_demo_model/train.py --data .train --out build/demo_model --minutes 3.3 --compile

Runs on one GPU in bfloat16 autocast, or on the CPU in float32 (for a try with few steps). Ends after --steps or when
--minutes have passed since the imports, whichever comes first; the learning rate reaches its floor by then, and the
outputs are always written. The seed fixes the first weights and the order of the data; a GPU's sums and, where the
time ends the run, the clock still make two runs differ a little.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoint import BOS_ID, write_checkpoint
from model import DemoModel, Shape
from samples import write_samples
from torch import Tensor

WARM_UP_STEPS = 200
FINAL_LR_SHARE = 0.02
RESERVE_SECONDS = 20.0  # for the last evaluation, the samples and the files
SYNC_STEPS = 10  # the host waits for the device this often, so that its clock is true
EVAL_ROWS = 8


@dataclass(frozen=True)
class Settings:
    """What decides the run, as written into training.json."""

    steps: int
    minutes: float
    rows: int
    tokens_per_row: int
    peak_lr: float
    weight_decay: float
    seed: int
    rows_from: str
    compile: bool
    eval_every: int


class Trainer:
    """Owns the model, its optimiser and the data on the device. One instance, used by `main`."""

    def __init__(self, settings: Settings, shape: Shape, data: Path, device: torch.device, started: float) -> None:
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self._settings, self._device, self._started = settings, device, started
        self._train = _ids(data / "train.bin", shape, device)
        self._begins = _begins(self._train, settings)
        self._val = _ids(data / "val.bin", shape, device)
        self._draw = torch.Generator().manual_seed(settings.seed)
        self.model = DemoModel(shape).to(device)
        self._loss: Callable[[Tensor, Tensor], Tensor] = torch.compile(self.model) if settings.compile else self.model
        matrices = [weight for weight in self.model.parameters() if weight.dim() == 2]
        vectors = [weight for weight in self.model.parameters() if weight.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)

    def run(self) -> list[dict[str, float]]:
        """Trains to the end; returns the loss curve, a point per evaluation."""
        curve: list[dict[str, float]] = []
        losses: list[Tensor] = []
        step, progress = 0, 0.0
        while progress < 1.0:
            losses.append(self._step(step, progress))
            step += 1
            if step % SYNC_STEPS == 0:
                losses[-1].item()
            progress = self._progress(step)
            if step % self._settings.eval_every == 0 or progress >= 1.0 or step == 1:
                curve.append(self._point(step, progress, losses))
                losses.clear()
        return curve

    def _step(self, step: int, progress: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr(step, progress)
        ids, targets = self._batch()
        with self._autocast():
            loss = self._loss(ids, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Rows of the token stream from random beginnings; the documents of a row follow each other."""
        length = self._settings.tokens_per_row
        chosen = torch.randint(self._begins.numel(), (self._settings.rows, 1), generator=self._draw)
        starts = self._begins[chosen.to(self._device)]
        window = self._train[starts + torch.arange(length + 1, device=self._device)]
        return window[:, :-1], window[:, 1:]

    @torch.no_grad()
    def val_loss(self) -> float:
        """Mean loss over all held-out tokens, in nats."""
        length = self._settings.tokens_per_row
        rows = (self._val.numel() - 1) // length
        ids = self._val[: rows * length].view(rows, length)
        targets = self._val[1 : rows * length + 1].view(rows, length)
        total = 0.0
        for start in range(0, rows, EVAL_ROWS):
            part = slice(start, start + EVAL_ROWS)
            with self._autocast():
                total += self.model(ids[part], targets[part]).item() * ids[part].shape[0]
        return total / rows

    def _point(self, step: int, progress: float, losses: list[Tensor]) -> dict[str, float]:
        tokens = step * self._settings.rows * self._settings.tokens_per_row
        train = torch.stack(losses).mean().item()
        point = {
            "step": step,
            "tokens": tokens,
            "seconds": round(time.monotonic() - self._started, 1),
            "lr": round(self._lr(step, progress), 6),
            "train_loss": round(train, 4),
            "val_loss": round(self.val_loss(), 4),
        }
        print(json.dumps(point), flush=True)
        return point

    def _progress(self, step: int) -> float:
        """0 at the start, 1 at the end: the larger one of the shares of steps and of time that are used up."""
        limit = max(1.0, self._settings.minutes * 60 - RESERVE_SECONDS)
        return max(step / self._settings.steps, (time.monotonic() - self._started) / limit)

    def _lr(self, step: int, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        return self._settings.peak_lr * warm_up * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")


def main() -> None:
    started = time.monotonic()
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = (field for field in Settings.__dataclass_fields__)
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    shape = Shape()
    trainer = Trainer(settings, shape, arguments.data, device, started)
    curve = trainer.run()
    write_checkpoint(arguments.out, shape, trainer.model.state_dict(), arguments.data / "tokenizer.json")
    trainer.model.load_state_dict({name: weight.half() for name, weight in trainer.model.state_dict().items()})
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "shape": asdict(shape),
        "settings": asdict(settings),
        "data": json.loads((arguments.data / "data.json").read_text(encoding="utf-8")),
        "val_loss_float16": round(trainer.val_loss(), 4),
        "curve": curve,
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_samples(arguments.out / "samples.txt", trainer.model, arguments.data / "tokenizer.json", device)
    print(f"done in {time.monotonic() - started:.1f} s", flush=True)


def _ids(file: Path, shape: Shape, device: torch.device) -> Tensor:
    """The ids of `file` [n] int64 on `device`. Raises ValueError for an id outside the vocabulary."""
    ids = torch.from_numpy(np.memmap(file, dtype="<u2", mode="r").astype(np.int64)).to(device)
    if int(ids.max()) >= shape.vocab_size:
        raise ValueError(f"{file} has id {int(ids.max())}, the vocabulary has {shape.vocab_size}")
    return ids


def _begins(ids: Tensor, settings: Settings) -> Tensor:
    """The places of `ids` [n] where a row may begin."""
    places = torch.arange(ids.numel() - settings.tokens_per_row, device=ids.device)
    return places[ids[: places.numel()] == BOS_ID] if settings.rows_from == "documents" else places


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=3.3, help="end after this time at the latest")
    parser.add_argument("--rows", type=int, default=32, help="rows in a batch")
    parser.add_argument("--tokens-per-row", type=int, default=2048)
    parser.add_argument(
        "--rows-from",
        choices=("documents", "anywhere"),
        default="documents",
        help="where rows begin: at the <s> of a document, as prompts do, or anywhere",
    )
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=250, help="steps between two points of the loss curve")
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
