"""Train the controller of method `adore`: which cached tokens will the target look at?

    python -m adore.train --text FILE [--text FILE ...] --out controller.safetensors [--target FOLDER]

Windows of the texts, half of them with planted facts, are read by the target. In rounds at random places its own attention,
the mean over layers with full attention, heads and the round's queries, says what it looks at; a token's label is the share of
the budgets (2, 5 and 10%) whose list it would be in. The controller learns them by cross-entropy; the last window is kept
apart, to see what lists by its scores would hold. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from outrider.decoding.pair import BUILTIN, PAIR_FOLDER, identity
from outrider.guidance.controller import Controller, ControllerFile, save
from outrider.models import LanguageModel, load_model
from outrider.models.cache import aligned
from outrider.models.quantization import dequantize
from outrider.ops import attention_mass
from pair.data import Windows

SHARES = (0.02, 0.05, 0.1)
ROUND = 5  # tokens: one pending, four drafted
DECAY = 0.01
CHUNK = 512  # tokens that the target reads at a time, and that a gradient goes back through
RATE = 1e-2
TABLE_RATE = 0.1  # of the tables by distance and position: a logit's whole range in a few dozen steps


@dataclass(frozen=True, slots=True)
class Labelled:
    """A window of S tokens and what the target looks at in R of its rounds."""

    embeddings: Tensor  # [S, E]
    starts: Tensor  # [R] int64, tokens in front of a round
    mass: Tensor  # [R, S] fp16, 0 behind the start

    def labels(self, rounds: Tensor) -> Tensor:
        """Share of `SHARES` whose list a token is in, for some rounds: [r, S]."""
        order = self.mass[rounds].float().argsort(dim=-1, descending=True).argsort(dim=-1)  # 0: the most mass
        return sum((order < (share * self.starts[rounds])[:, None]).float() for share in SHARES) / len(SHARES)


def label(target: LanguageModel, tokens: Tensor, rounds: int, least: int, rng: random.Random) -> Labelled:
    """Read `tokens` [S] and note the attention of `rounds` rounds, none before `least` tokens."""
    spec, size, device = target.spec, len(tokens), target.spec.device
    places = [n for n in range(least, size - ROUND + 1) if n % CHUNK <= CHUNK - ROUND]  # within a chunk
    starts = sorted(rng.sample(places, rounds))
    mass = torch.zeros(rounds, size, dtype=torch.float16, device=device)
    cache = target.new_cache(1, aligned(size))
    for begin in range(0, size, CHUNK):
        part = tokens[None, begin : begin + CHUNK]
        queries = target.forward(part, cache, record_queries=True, logits=False).queries
        for row, start in enumerate(starts):
            if not begin <= start < begin + CHUNK:
                continue
            for layer in spec.full_layers:
                keys = dequantize(cache.keys(layer, start + ROUND), cache.key_scales[layer], spec.dtype)
                asked, length = queries[layer][:, start - begin : start - begin + ROUND], torch.tensor([start], device=device)
                seen = attention_mass(asked, keys, length, scale=spec.layers[layer].scale)[0, :, :start].mean(0)
                mass[row, :start] += (1000 / len(spec.full_layers) * seen).half()  # of 1000: fp16 holds it well
        cache.advance(part.shape[1])
    embeddings = target.module.get_input_embeddings()(tokens.to(device)).detach()
    return Labelled(embeddings, torch.tensor(starts, device=device), mass)


def loss_of(controller: Controller, window: Labelled, states: Tensor, rounds: Tensor) -> Tensor:
    """Mean cross-entropy of some rounds' cached tokens, asked about by each of their queries; `states` [S, w]."""
    starts = window.starts[rounds]
    asking = states[starts[:, None] + torch.arange(ROUND, device=starts.device)]
    logits = controller.logits(asking, states.expand(len(rounds), -1, -1), starts)  # [r, T, S]
    wanted = window.labels(rounds)[:, None].expand_as(logits)
    each = binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    past = torch.arange(len(states), device=starts.device) < starts[:, None]
    return (each * past).sum() / past.sum()


@torch.no_grad()
def held(window: Labelled, controller: Controller | None = None) -> dict[str, float]:
    """Share of the mass that lists by the controller's scores hold, by budget; without one, the best lists there are.

    Chance would hold the budget itself.
    """
    states = None if controller is None else controller.states(window.embeddings[None])
    found: dict[str, list[float]] = {f"{share:g}": [] for share in SHARES}
    for row, start in enumerate(window.starts.tolist()):
        scores = mass = window.mass[row, :start].float()
        if controller is not None and states is not None:
            asked = states[:, start : start + ROUND], states[:, :start], window.starts[row : row + 1]
            scores = controller.logits(*asked).sigmoid().mean(1)[0]
        for share in SHARES:
            listed = scores.topk(max(1, round(share * start))).indices
            found[f"{share:g}"].append(float(mass[listed].sum() / mass.sum()))
    return {share: round(sum(parts) / len(parts), 4) for share, parts in found.items()}


def train(controller: Controller, windows: list[Labelled], steps: int, rounds: int, seed: int) -> Iterator[float]:
    """One window a step; yields the loss. Gradients go back through `CHUNK` tokens: a chunk begins with the state in which
    the one before it ended when the window was last read."""
    generator, width = torch.Generator().manual_seed(seed), controller.width
    tables = [controller.distance, controller.position]
    rest = [weight for weight in controller.parameters() if all(weight is not table for table in tables)]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": tables, "weight_decay": 0.0}], weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, TABLE_RATE], total_steps=steps, pct_start=0.1)
    before = [x.embeddings.new_zeros(len(x.embeddings) // CHUNK, width, dtype=torch.float32) for x in windows]
    for step in range(steps):
        window, first = windows[step % len(windows)], before[step % len(windows)]
        states = controller.states(window.embeddings.unflatten(0, (-1, CHUNK)), first.clone())  # [S / CHUNK, CHUNK, w]
        first[1:] = states[:-1, -1].detach()
        picked = torch.randperm(len(window.starts), generator=generator)[:rounds].to(window.starts.device)
        loss = loss_of(controller, window, states.flatten(0, 1), picked)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controller.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", required=True, help="UTF-8 text (repeatable)")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--target", default=BUILTIN, help="folder or hub id; default: the built-in target")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=8192, help=f"tokens of a window, a multiple of {CHUNK}")
    parser.add_argument("--windows", type=int, default=17, help="of which the last is kept apart")
    parser.add_argument("--label-rounds", type=int, default=96, help="rounds of a window with labels")
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--step-rounds", type=int, default=12, help="rounds of a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.length % CHUNK or args.windows < 2:
        parser.error(f"--length must be a multiple of {CHUNK}, --windows at least 2")

    began = time.perf_counter()
    target = load_model(str(PAIR_FOLDER / "target") if args.target == BUILTIN else args.target, device=args.device)
    texts = [path.read_text(encoding="utf-8") for path in args.text]
    tokens = np.array([token for text in texts for token in target.tokenizer(text, verbose=False)["input_ids"]])
    cut = Windows(tokens, target.tokenizer.backend_tokenizer, args.length, args.seed)
    rng, labelled = random.Random(args.seed), []
    for number in range(args.windows):
        window = torch.from_numpy(cut[number][: args.length].astype(np.int64))
        labelled.append(label(target, window, args.label_rounds, args.length // 16, rng))
        print(json.dumps({"labelled": number + 1, "seconds": round(time.perf_counter() - began)}), flush=True)

    torch.manual_seed(args.seed)
    controller = Controller(labelled[0].embeddings.shape[-1]).to(target.spec.device)
    *learned, apart = labelled
    print(json.dumps({"best": held(apart), "step": 0, "held": held(apart, controller)}), flush=True)
    losses = []
    for step, loss in enumerate(train(controller, learned, args.steps, args.step_rounds, args.seed), start=1):
        losses.append(loss)
        if step % 80 == 0 or step == args.steps:
            said = {"step": step, "loss": round(sum(losses) / len(losses), 5), "held": held(apart, controller)}
            print(json.dumps(said | {"seconds": round(time.perf_counter() - began)}), flush=True)
            losses.clear()
    file = ControllerFile(
        target=identity(target),
        text=", ".join(path.stem for path in args.text),
        text_digest=hashlib.sha256("".join(texts).encode()).hexdigest()[:16],
        tokens=args.windows * args.length,
        controller=controller,
    )
    save(file, args.out)


if __name__ == "__main__":
    main()
