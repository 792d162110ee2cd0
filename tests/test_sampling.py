"""Sampled speculation: the target's own distribution, and plain sampling's own tokens for a seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vispec
from tests import tiny
from tests.replay import ReplayDraft

LAWS = (
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 0, "min_p": 0.1},
)
TREES = (
    vispec.TreeConfig(depth=3, top_k=8, total_tokens=30),
    vispec.TreeConfig(depth=1, top_k=2, total_tokens=4),
    vispec.TreeConfig(depth=4, top_k=1, total_tokens=6),
)


def fresh_draft(model) -> vispec.ViSpecDraft:
    torch.manual_seed(1)
    return vispec.ViSpecDraft.for_target(model)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_seed_gives_the_same_tokens_whatever_the_draft_or_tree(name):
    family = tiny.build(name)
    inputs = family.prompt(1 if name in tiny.VISION_FAMILIES else 0, seed=3)
    length = inputs["input_ids"].shape[1]
    for seed, law in enumerate(LAWS):
        options = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": tiny.VOCABULARY + 1, **law}
        options["seed"] = 100 + seed
        plain = vispec.fast_generate(family.model, None, inputs, **options)
        replay = ReplayDraft(
            {tuple(inputs["input_ids"][0].tolist()): plain[0, length:].tolist()}, tiny.VOCABULARY, hit_rate=0.9
        )
        for tree in TREES:
            for draft in (fresh_draft(family.model), replay):
                assert torch.equal(vispec.fast_generate(family.model, draft, inputs, tree=tree, **options), plain)
        others = (
            vispec.fast_generate(family.model, None, inputs, **{**options, "seed": 200 + other}) for other in range(9)
        )
        assert any(not torch.equal(other, plain) for other in others)


def test_a_seed_gives_the_same_tokens_in_any_batch():
    family = tiny.build("llava")
    prompts = [family.prompt(row % 2, seed=30 + row, text=4 + row) for row in range(4)]
    seeds = [5, 2**63 + 11, 5, 77]
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0}
    draft = fresh_draft(family.model)
    batch = family.batch(prompts, "left")
    together = vispec.fast_generate(family.model, draft, batch, seed=seeds, tree=vispec.TreeConfig(), **options)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = vispec.fast_generate(family.model, None, prompt, seed=seed, **options)
        new = alone[0, prompt["input_ids"].shape[1] :].tolist()
        assert together[row, batch["input_ids"].shape[1] :].tolist()[: len(new)] == new


def test_without_a_seed_torch_decides():
    family = tiny.build("llama")
    inputs = family.prompt(0, seed=3)
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0}

    def run(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return vispec.fast_generate(family.model, None, inputs, **options)[0].tolist()

    assert run(1) == run(1) != run(2)


def test_a_very_low_temperature_is_greedy():
    family = tiny.build("llama")
    inputs = family.prompt(0, seed=3)
    greedy = vispec.fast_generate(family.model, None, inputs, max_new_tokens=12, do_sample=False)
    cold = vispec.fast_generate(family.model, None, inputs, max_new_tokens=12, do_sample=True, temperature=1e-6)
    assert torch.equal(cold, greedy)


NEW_TOKENS = 3
SAMPLES = 6000


@pytest.fixture(scope="module")
def little_model():
    """A language model with six tokens, so that every sequence can be enumerated."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).float().eval()


def exact_law(model, prompt: torch.Tensor, law: dict) -> dict[tuple, float]:
    """Probability of every continuation, from plain forward passes and Hugging Face's own warpers."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(law["temperature"])] if law["temperature"] != 1 else []
    warpers += [TopKLogitsWarper(law["top_k"])] if law["top_k"] else []
    warpers += [TopPLogitsWarper(law["top_p"])] if "top_p" in law else []
    warpers += [MinPLogitsWarper(law["min_p"])] if "min_p" in law else []
    sequences = torch.tensor(list(itertools.product(range(6), repeat=NEW_TOKENS)))
    full = torch.cat([prompt.expand(len(sequences), -1), sequences], dim=1)
    with torch.inference_mode():
        logits = model(full).logits
    probability = torch.ones(len(sequences), dtype=torch.float64)
    for step in range(NEW_TOKENS):
        at = prompt.shape[1] + step
        scores = logits[:, at - 1]
        for warper in warpers:
            scores = warper(full[:, :at], scores)
        probability *= scores.double().softmax(-1).gather(1, full[:, at : at + 1])[:, 0]
    assert abs(float(probability.sum()) - 1) < 1e-9
    return {tuple(key): float(value) for key, value in zip(sequences.tolist(), probability, strict=True)}


def chi_square_p_value(counts: dict[tuple, int], law: dict[tuple, float], total: int) -> float:
    """Pearson's test, with cells of fewer than five expected draws pooled (Wilson-Hilferty's approximation)."""
    cells, pooled = [], [0.0, 0]
    for key, probability in law.items():
        expected = probability * total
        if expected >= 5:
            cells.append((expected, counts.get(key, 0)))
        else:
            pooled[0] += expected
            pooled[1] += counts.get(key, 0)
    if pooled[0] >= 5:
        cells.append(tuple(pooled))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)
    deviate = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5
    return float(torch.special.ndtr(torch.tensor(-deviate, dtype=torch.float64)))


@pytest.mark.parametrize("law", LAWS, ids=("plain", "top-k and top-p", "min-p"))
def test_sampled_sequences_follow_the_targets_law(little_model, law):
    prompt = torch.tensor([[1, 4, 2]])
    exact = exact_law(little_model, prompt, law)
    drafts = {"vispec": fresh_draft(little_model)}
    likely = max(exact, key=exact.get)
    drafts["replay"] = _Constant(list(likely))
    for label, draft in drafts.items():
        result = vispec.fast_generate(
            little_model,
            draft,
            {"input_ids": prompt.expand(SAMPLES, -1)},
            tree=vispec.TreeConfig(depth=2, top_k=3, total_tokens=8),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            seed=list(range(SAMPLES)),
            return_dict_in_generate=True,
            **law,
        )
        assert result.stats.tau > 0.2, label
        counts: dict[tuple, int] = {}
        for row in result.sequences[:, prompt.shape[1] :].tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        assert not [key for key in counts if exact[key] == 0], f"{label}: a filtered token was drawn"
        assert chi_square_p_value(counts, exact, SAMPLES) > 1e-3, label


class _Constant:
    """Proposes one fixed continuation, whatever was drawn before: a draft that is confident and often wrong."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.emitted = 0

    def check(self, target) -> None:
        pass

    def widest(self, target) -> int:
        return target.vocabulary

    def start(self, target, prompt, first_tokens):
        self.position = torch.ones_like(first_tokens)
        return self

    def commit(self, features, tokens, counts, host_counts) -> None:
        self.position = self.position + counts

    def propose(self, root_tokens, plan):
        from vispec.tree import DraftTree

        batch, nodes = len(root_tokens), 3
        tree = DraftTree.empty(batch, nodes, plan.tree.longest_path, root_tokens.device)
        tree.scores.zero_()
        tree.tokens[:, 0] = root_tokens
        table = torch.tensor([*self.tokens, 0, 1])
        for node in (1, 2):
            tree.tokens[:, node] = table[self.position.clamp(max=len(table) - 2) + node - 1]
        tree.parents.copy_(torch.tensor([-1, 0, 1]))
        tree.depths.copy_(torch.tensor([0, 1, 2]))
        tree.ancestors.copy_(torch.tensor([[1], [3], [7]]))
        return tree


def test_the_chi_square_test_can_fail(little_model):
    law = LAWS[0]
    prompt = torch.tensor([[1, 4, 2]])
    exact = exact_law(little_model, prompt, law)
    tilted = {key: value * (1.6 if key[1] == 2 else 1.0) for key, value in exact.items()}
    total = sum(tilted.values())
    counts = {key: round(SAMPLES * value / total) for key, value in tilted.items()}
    assert chi_square_p_value(counts, exact, SAMPLES) < 1e-3
