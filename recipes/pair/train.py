"""Train one model of the pair: from scratch, from given weights, or by distillation from the other.

    python -m pair.train --data tokens.bin --tokenizer tokenizer.json --model wide --tokens 2e9 --out RUN/wide.pt
    torchrun --nproc-per-node 4 -m pair.train ... --model target --init RUN/pruned.pt --teacher RUN/wide.pt --out RUN/target.pt
    torchrun --nproc-per-node 4 -m pair.train ... --model draft --teacher RUN/target.pt --out RUN/draft.pt

A run that stops continues from its last checkpoint when the same command is given again; data and order are
those of an uninterrupted run. Without a GPU it runs on the CPU in fp32, good for trying things out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from pair.data import Batches, Windows
from pair.model import CONFIGS, Config, Model, distillation_loss, next_token_loss
from pair.muon import Muon, orthogonalise
from pair.schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """What a run computes. A checkpoint continues only under equal settings."""

    model: Config
    schedule: Schedule
    seed: int = 0
    matrix_rate: float = 0.02
    matrix_decay: float = 0.01
    other_rate: float = 3e-3
    sharpen: float = 0.2
    rate: float = 1.0  # multiple of both learning rates


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run, and its device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> Processes:
        """Join the group that torchrun started, if it did."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        return cls(rank, world, device)


class Run:
    """One model in training: weights, optimisers and the step it has reached."""

    def __init__(
        self, settings: Settings, processes: Processes, init: Model | None, teacher: Model | None, micro_tokens: int
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.processes, self.micro_tokens, self.step = settings, processes, micro_tokens, 0
        if init is not None and init.config != settings.model:
            raise ValueError(f"the initial weights are of another model: {init.config}, not {settings.model}")
        self.model = (init or Model(settings.model)).to(processes.device)
        inner = {id(p): p for p in self.model.layers.parameters() if p.ndim == 2}
        rest = [p for p in self.model.parameters() if id(p) not in inner]
        self.muon = Muon(inner.values(), lr=settings.matrix_rate, weight_decay=settings.matrix_decay)
        self.adam = torch.optim.AdamW(rest, lr=settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.loss: Callable[[Tensor], Tensor] = lambda tokens: next_token_loss(self.model, tokens)
        if teacher is not None:
            teacher = teacher.to(processes.device, torch.bfloat16 if processes.device.type == "cuda" else None)
            teacher = teacher.eval().requires_grad_(False)
            self.loss = lambda tokens: distillation_loss(self.model, teacher, tokens, settings.sharpen)
        if processes.device.type == "cuda":
            self.loss = torch.compile(self.loss, dynamic=False)
            self.muon.orthogonalise = torch.compile(orthogonalise, dynamic=False)

    def update(self, batch: Tensor) -> Tensor:
        """One optimiser step on this process's share of the batch [windows, T + 1]; returns its mean loss."""
        batch = batch.to(self.processes.device, non_blocking=True)
        parts = batch.split(max(1, self.micro_tokens // (batch.shape[1] - 1)))
        total = torch.zeros((), device=batch.device)
        for part in parts:
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
                loss = self.loss(part) * (len(part) / len(batch))
            loss.backward()
            total += loss.detach()
        self._average_gradients()
        rate = self.settings.rate * self.settings.schedule.rate(self.step)
        for optimiser, full in ((self.muon, self.settings.matrix_rate), (self.adam, self.settings.other_rate)):
            optimiser.param_groups[0]["lr"] = full * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _average_gradients(self) -> None:
        if self.processes.world == 1:
            return
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.processes.world
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [f.view_as(g) for f, g in zip(parts, grads, strict=True)])

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the last one in place."""
        state = {
            "config": self.settings.model.to_dict(),
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same settings."""
        state = torch.load(path, map_location=self.processes.device)
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"{path} was made with other settings: {state['settings']}, not {asdict(self.settings)}")
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step = state["step"]


def load_model(path: Path) -> Model:
    """The model of a checkpoint, or of a folder written by `pair.export`, in fp32 on the CPU."""
    if path.is_dir():
        return load_export(path)
    state = torch.load(path, map_location="cpu")
    model = Model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model


def train(
    settings: Settings,
    data: Path,
    tokenizer: Path,
    out: Path,
    teacher: Path | None = None,
    init: Path | None = None,
    *,
    max_steps: int | None = None,
    micro_tokens: int = 65_536,
    save_every: int = 1000,
    log_every: int = 50,
    workers: int = 6,
) -> Run:
    """Train until the schedule ends, or ``max_steps`` steps from here; leaves a checkpoint in ``out``."""
    processes = Processes.join()
    run = Run(settings, processes, *(load_model(path) if path else None for path in (init, teacher)), micro_tokens)
    if out.exists():
        run.load(out)
    first, schedule = run.step, settings.schedule
    end = schedule.steps if max_steps is None else min(schedule.steps, first + max_steps)
    tokens, bpe = np.memmap(data, dtype="<u2", mode="r"), Tokenizer.from_file(str(tokenizer))
    log = Log(schedule, log_every, quiet=processes.rank > 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    for length, stage_first, stage_end in schedule.stages():
        windows = Windows(tokens, bpe, length, settings.seed)
        batches = Batches(windows, schedule.batch_tokens // length, processes.rank, processes.world)
        numbers = range(max(run.step, stage_first) - stage_first, min(end, stage_end) - stage_first)
        loader = DataLoader(batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=workers > 0)
        for batch in loader if len(numbers) else ():
            log.add(run.step, length, run.update(batch))
            if processes.rank == 0 and run.step % save_every == 0:
                run.save(out)
    if processes.rank == 0 and run.step > first:
        run.save(out)
    if processes.world > 1:
        dist.barrier()
    return run


def load_export(folder: Path) -> Model:
    """The model of a Hugging Face folder with the sizes of `Config`."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = Config(
        layers=stored["num_hidden_layers"],
        width=stored["hidden_size"],
        heads=stored["num_attention_heads"],
        kv_heads=stored["num_key_value_heads"],
        hidden=stored["intermediate_size"],
        vocab=stored["vocab_size"],
    )
    model = Model(config)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    return model


class Log:
    """A line every so many steps: loss since the last one, learning rate, speed, time left at this speed."""

    def __init__(self, schedule: Schedule, every: int, quiet: bool) -> None:
        self.schedule, self.every, self.quiet = schedule, every, quiet
        self.losses: list[Tensor] = []
        self.since = time.perf_counter()

    def add(self, step: int, length: int, loss: Tensor) -> None:
        """Note the loss of a step; losses stay on their device until a line is due."""
        self.losses.append(loss)
        if (step + 1) % self.every:
            return
        mean, count = torch.stack(self.losses).mean().item(), len(self.losses)
        now = time.perf_counter()
        speed = count * self.schedule.batch_tokens / (now - self.since)
        left = (self.schedule.steps - step - 1) * self.schedule.batch_tokens / speed
        if not self.quiet:
            print(
                f"step {step + 1}/{self.schedule.steps} window {length} loss {mean:.4f} "
                f"rate {self.schedule.rate(step):.3f} {speed / 1e6:.3f}M tokens/s, {left:.0f} s left",
                flush=True,
            )
        self.losses, self.since = [], now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="token file made by pair.data")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, and to continue if it exists")
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--teacher", type=Path, help="checkpoint to distil from")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--rate", type=float, default=Settings.rate, help="multiple of the learning rates")
    parser.add_argument("--tokens", type=float, required=True, help="length of the whole run, such as 2e9")
    parser.add_argument("--batch-tokens", type=int, default=Schedule.batch_tokens)
    parser.add_argument("--long-share", type=float, default=Schedule.long_share, help="share of tokens in long windows")
    parser.add_argument("--sharpen", type=float, default=Settings.sharpen)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-tokens", type=int, default=65_536, help="tokens per forward pass of one process")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps; the same command continues")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=6, help="data processes beside each training process")
    parser.add_argument("--attention", choices=("any", "flash", "cudnn"), default="any", help="CUDA kernels to use")
    args = parser.parse_args()
    if args.attention != "any":
        torch.backends.cuda.enable_flash_sdp(args.attention == "flash")
        torch.backends.cuda.enable_cudnn_sdp(args.attention == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    schedule = Schedule(int(args.tokens), args.batch_tokens, long_share=args.long_share)
    settings = Settings(CONFIGS[args.model], schedule, args.seed, sharpen=args.sharpen, rate=args.rate)
    train(
        settings,
        args.data,
        args.tokenizer,
        args.out,
        args.teacher,
        args.init,
        max_steps=args.max_steps,
        micro_tokens=args.micro_tokens,
        log_every=args.log_every,
        workers=args.workers,
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
