"""A draft that knows the answer: it proposes the true continuation at a chosen hit rate, among wrong siblings."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests import tiny
from vispec.drafts.base import Places, Plan
from vispec.prompt import Prompt
from vispec.tree import DraftTree, TreeConfig


def answered(family: tiny.Family, **options) -> tuple[dict, dict[tuple, list[int]]]:
    """A ragged batch of three prompts, with pictures where the family takes them, and its plain answers."""
    images = (1, 0, 2) if family.name in tiny.VISION_FAMILIES else (0, 0, 0)
    prompts = [family.prompt(count, seed=10 + row, text=5 + 3 * row) for row, count in enumerate(images)]
    answers = {}
    for prompt in prompts:
        key = tuple(prompt["input_ids"][0].tolist())
        answers[key] = family.model.generate(**prompt, **options)[0, len(key) :].tolist()
    return family.batch(prompts, "left"), answers


class ReplayDraft:
    """Proposes trees that hold a true path of random length, so that long acceptances and misses both occur.

    `answers` maps a prompt without padding (a tuple of ids) to the new tokens of plain generation.
    """

    def __init__(self, answers: dict[tuple, list[int]], vocabulary: int, hit_rate: float, seed: int = 0) -> None:
        self.answers = answers
        self.vocabulary = vocabulary
        self.hit_rate = hit_rate
        self.seed = seed

    def check(self, target: object) -> None:
        """Any target will do."""

    def widest(self, target: object) -> int:
        return self.vocabulary

    def start(self, target: object, prompt: Prompt, first_tokens: Tensor) -> ReplaySession:
        rows = zip(prompt.tokens.tolist(), prompt.lengths.tolist(), strict=True)
        answers = [self.answers[tuple(tokens[:length])] for tokens, length in rows]
        return ReplaySession(self, answers)


class ReplaySession:
    """Counts what has been committed and keeps to the answers from there."""

    def __init__(self, draft: ReplayDraft, answers: list[list[int]]) -> None:
        self.draft = draft
        self.answers = answers
        self.random = random.Random(draft.seed)
        self.emitted = [1] * len(answers)
        self.proposed = 0

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int]) -> None:
        assert features.shape[:2] == tokens.shape
        for row, count in enumerate(host_counts):
            true = self.answers[row][self.emitted[row] : self.emitted[row] + count]
            assert tokens[row, : len(true)].tolist() == true
            self.emitted[row] += count

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        self.proposed += 1
        batch, nodes, longest = len(self.answers), plan.tree.nodes, plan.tree.longest_path
        tree = DraftTree.empty(batch, nodes, longest, root_tokens.device)
        tree.scores.zero_()
        for row in range(batch):
            tokens, parents = self._grow(int(root_tokens[row]), self.answers[row][self.emitted[row] :], nodes, longest)
            depths, words = [0], [1]
            for node in range(1, nodes):
                depths.append(depths[parents[node]] + 1)
                words.append(words[parents[node]] | 1 << node)
            tree.tokens[row], tree.parents[row] = torch.tensor(tokens), torch.tensor(parents)
            tree.depths[row] = torch.tensor(depths)
            for word in range(tree.ancestors.shape[2]):
                part = [bits >> 64 * word & (1 << 64) - 1 for bits in words]
                tree.ancestors[row, :, word] = torch.tensor(
                    [bits - (1 << 64) if bits >> 63 else bits for bits in part], dtype=torch.int64
                )
        return tree

    def _grow(self, root: int, truth: list[int], nodes: int, longest: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one row's tree; parents come before their children."""
        tokens, parents, depths = [root], [-1], [0]
        children: list[set[int]] = [set()]
        on_path = 0

        def add(parent: int, token: int) -> int:
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            children[parent].add(token)
            children.append(set())
            return len(tokens) - 1

        for token in truth[: longest - 1]:
            if len(tokens) < nodes and self.random.random() < self.draft.hit_rate:
                for _ in range(self.random.randrange(3)):
                    wrong = self.random.randrange(self.draft.vocabulary)
                    if len(tokens) + 1 < nodes and wrong != token and wrong not in children[on_path]:
                        add(on_path, wrong)
                on_path = add(on_path, token)
            else:
                break
        while len(tokens) < nodes:
            parent = self.random.randrange(len(tokens))
            token = self.random.randrange(self.draft.vocabulary)
            if depths[parent] < longest - 1 and token not in children[parent]:
                add(parent, token)
        return tokens, parents


class DeviceReplayDraft:
    """As `ReplayDraft`, but without the host: a chain of true tokens, wrong at every so-manieth place.

    `answers` [B, A] int64 holds the new tokens of plain generation, one row a prompt.
    """

    def __init__(self, answers: Tensor, vocabulary: int, miss_every: int) -> None:
        self.answers = answers
        self.vocabulary = vocabulary
        self.miss_every = miss_every

    def check(self, target: object) -> None:
        """Any target will do."""

    def widest(self, target: object) -> int:
        return self.vocabulary

    def start(self, target: object, prompt: Prompt, first_tokens: Tensor) -> DeviceReplaySession:
        return DeviceReplaySession(self)


class DeviceReplaySession:
    """Counts what has been committed on the device."""

    def __init__(self, draft: DeviceReplayDraft) -> None:
        self.draft = draft
        self.emitted = torch.ones_like(draft.answers[:, 0])

    def settle(self, places: Places) -> None:
        self.emitted = places.tensor("emitted", self.emitted)

    def fix(self, tokens: int, tree: TreeConfig) -> None:
        """Nothing moves and nothing is read back anyway."""

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        self.emitted += counts

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        batch, nodes, device = len(root_tokens), plan.tree.longest_path, root_tokens.device
        tree = DraftTree.empty(batch, nodes, nodes, device)
        chain = torch.arange(nodes, device=device)
        places = self.emitted[:, None] + chain - 1
        known = self.draft.answers.gather(1, places.clamp(max=self.draft.answers.shape[1] - 1))
        wrong = places % self.draft.miss_every == 0
        tree.tokens.copy_(torch.where(wrong, (known + 1) % self.draft.vocabulary, known))
        tree.tokens[:, 0] = root_tokens
        tree.parents.copy_(chain - 1)
        tree.depths.copy_(chain)
        tree.ancestors.copy_(((2 << chain) - 1)[:, None])
        tree.scores.zero_()
        return tree
