"""The drafts that ViSpec is compared with: lossless each, saved and read, and proposing what they are said to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import vispec
from tests import tiny
from tests.test_draft import random_draft
from tests.test_greedy import NEW_TOKENS, TREES, plain, unpadded
from vispec.drafts import MedusaDraft, OracleDraft, PromptLookupDraft, ViSpecDraft
from vispec.drafts.base import Plan
from vispec.prompt import Span
from vispec.targets import load_target
from vispec.train.checkpoint import _resized
from vispec.tree import TreeConfig

FAMILIES = ("llava", "qwen2_5_vl", "llama")


def random_medusa(model, heads: int = 6) -> MedusaDraft:
    draft = MedusaDraft.for_target(model, heads)
    generator = torch.Generator().manual_seed(2)
    for parameter in draft.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return draft


KINDS = {
    "eagle": lambda model: random_draft(model, queries=0),
    "text eagle": lambda model: _resized(random_draft(model, queries=0), picture_rows=False),
    "no global feature": lambda model: _resized(random_draft(model, queries=5), global_feature=False),
    "many queries": lambda model: random_draft(model, queries=17),
    "medusa": random_medusa,
    "prompt lookup": lambda model: PromptLookupDraft(),
    "oracle": lambda model: OracleDraft(),
}


@pytest.fixture(scope="module")
def families():
    return {name: tiny.build(name) for name in FAMILIES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_speculation_equals_generate(families, name, kind):
    family = families[name]
    draft = KINDS[kind](family.model)
    for images in (0, 2) if name != "llama" else (0,):
        inputs = family.prompt(images, 3)
        expected = family.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        for label, tree in TREES.items():
            actual = vispec.fast_generate(family.model, draft, inputs, tree=tree, max_new_tokens=NEW_TOKENS)
            assert torch.equal(actual, expected), (label, images)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_ragged_batch_equal_rows_alone(families, kind):
    family = families["llava"]
    prompts = [family.prompt(count, seed=10 + row, text=5 + 3 * row) for row, count in enumerate((1, 0, 2))]
    answers = {unpadded(prompt)[0]: plain(family.model, prompt) for prompt in prompts}
    batch = family.batch(prompts, "left")
    sequences = vispec.fast_generate(family.model, KINDS[kind](family.model), batch, max_new_tokens=NEW_TOKENS)
    new = sequences[:, batch["input_ids"].shape[1] :].tolist()
    for row, key in enumerate(unpadded(batch)):
        assert new[row] == answers[key] + [tiny.PAD] * (len(new[row]) - len(answers[key]))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_does_not_depend_on_the_draft(families, kind):
    family = families["llava"]
    inputs = family.prompt(1, 4)
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": NEW_TOKENS, "seed": 9}
    expected = vispec.fast_generate(family.model, None, inputs, **options)
    assert torch.equal(vispec.fast_generate(family.model, KINDS[kind](family.model), inputs, **options), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("prompt lookup", "oracle")])
def test_drafts_go_out_and_come_back(families, tmp_path, kind):
    model = families["llava"].model
    draft = KINDS[kind](model)
    draft.head_tokens = torch.arange(4, 90, 2)
    draft.save_pretrained(tmp_path)
    back = vispec.load_draft(tmp_path, target=model)
    assert type(back) is type(draft) and not back.training
    names = [name for name in vars(back.config) if name != "num_key_value_heads"]
    assert [getattr(back.config, name) for name in names] == [getattr(draft.config, name) for name in names]
    assert back.state_dict().keys() == draft.state_dict().keys()
    for name, value in draft.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    with pytest.raises(ValueError, match="made for another target: vocab_size must be|hidden_size must be"):
        other = tiny.build("llama").model
        other.resize_token_embeddings(160)
        vispec.load_draft(tmp_path, target=other)


def test_bad_files(families, tmp_path):
    model = families["llava"].model
    random_medusa(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["MedusaDraft"] and settings["num_heads"] == 6
    for changes, message in (
        ({"num_heads": None}, "config.json must give num_heads, got None"),
        ({"num_heads": 7}, r"missing \['blocks.6.bias', 'blocks.6.weight'\]"),
        ({"architectures": ["ViSpecDraft"]}, "not a ViSpec or EAGLE draft"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(ValueError, match=message):
            vispec.load_draft(tmp_path, target=model)
    with pytest.raises(ValueError, match="picture_rows must be true with an adaptor, got 2 queries"):
        _resized(random_draft(model, queries=2), picture_rows=False)


def test_a_text_only_draft_sees_no_row_of_a_picture(families):
    draft = _resized(random_draft(families["llava"].model, queries=0), picture_rows=False)
    embeddings, features = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(5))
    spans = [Span(0, 3), Span(6, 4), Span(16, 4)]
    inside = [0, 1, 5, 6, 7, 8, 15, 16, 17, 18]
    text = [row for row in range(20) if row not in inside]
    with torch.inference_mode():
        rows, positions, visual = draft.prompt_rows(embeddings, features, spans)
        expected = draft.combine(embeddings[text], features[text], torch.zeros(len(text), 64))
        assert positions.tolist() == text and not visual.any()
        torch.testing.assert_close(rows, expected)
        embeddings[inside], features[inside] = float("nan"), float("nan")
        assert torch.equal(draft.prompt_rows(embeddings, features, spans)[0], rows)


def test_without_its_global_feature_a_picture_is_its_rows_alone(families):
    model = families["llava"].model
    whole = random_draft(model, queries=4)
    draft = _resized(whole, global_feature=False)
    embeddings, features = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        rows, positions, visual = draft.prompt_rows(embeddings, features, [Span(4, 8)])
        other, places, known = whole.prompt_rows(embeddings, features, [Span(4, 8)])
        compressed = whole.imadpt(embeddings[3:11])
    assert torch.equal(positions, places) and not visual.any() and known.any()
    torch.testing.assert_close(rows[3:6], compressed[:-1])
    assert torch.equal(rows[:6], other[:6]) and not torch.allclose(rows[6:], other[6:], atol=1e-2)


def test_medusas_tree_holds_the_heads_best_combinations(families):
    """Against every path that the heads' best tokens allow, scored one by one."""
    family = families["llava"]
    target, draft = load_target(family.model), random_medusa(family.model)
    draft.head_tokens = torch.arange(3, 120, 3)
    tree = TreeConfig(depth=2, top_k=4, total_tokens=14)
    inputs = family.batch([family.prompt(1, 3), family.prompt(0, 4, text=9)], "left")
    with torch.inference_mode():
        prompt = target.prefill(inputs)
        session = draft.start(target, prompt, prompt.logits.argmax(-1))
        features = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
        last = prompt.features[0, prompt.lengths[0] - 1], features[1, 1]
        session.commit(features, torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 2]), [0, 2])
        found = session.propose(torch.tensor([5, 6]), Plan(tree))
        for row in range(2):
            levels = []
            for head in range(3):
                hidden = last[row] + torch.nn.functional.silu(draft.blocks[head](last[row]))
                scores = target.head(hidden)[draft.head_tokens].log_softmax(-1)
                best = scores.topk(4)
                levels.append(dict(zip(draft.head_tokens[best.indices].tolist(), best.values.tolist(), strict=True)))
            paths = {(): 0.0}
            frontier = {(): 0.0}
            for level in levels:
                children = {(*path, token): s + own for path, s in frontier.items() for token, own in level.items()}
                paths |= children
                frontier = dict(sorted(children.items(), key=lambda item: -item[1])[:4])
            wanted = dict(sorted(paths.items(), key=lambda item: -item[1])[:14])
            tokens, parents = found.tokens[row].tolist(), found.parents[row].tolist()
            actual = {}
            for node in range(14):
                path, place = [], node
                while parents[place] >= 0:
                    path.insert(0, tokens[place])
                    place = parents[place]
                actual[tuple(path)] = float(found.scores[row, node])
            assert actual == {path: pytest.approx(score, abs=1e-4) for path, score in wanted.items()}
        # No deeper than there are heads.
        deepest = session.propose(torch.tensor([5, 6]), Plan(TreeConfig(depth=12, top_k=1, total_tokens=14)))
        assert deepest.longest_path == deepest.size == 7


def lookup(rows: list[list[int]], firsts: list[int], placeholders=(9,), **sizes):
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [77] * (longest - len(row)) for row in rows])
    prompt = SimpleNamespace(tokens=tokens, lengths=torch.tensor([len(row) for row in rows]))
    tree = TreeConfig(**{"depth": 3, "top_k": 2, "total_tokens": 12, **sizes})
    target = SimpleNamespace(placeholder_tokens=list(placeholders))
    session = PromptLookupDraft().start(target, prompt, torch.tensor(firsts))
    return SimpleNamespace(propose=lambda roots: session.propose(roots, Plan(tree)), commit=session.commit)


def test_prompt_lookup_proposes_what_followed():
    # The longest ending that occurred before: [2, 3, 4]; of its two occurrences the later one.
    session = lookup([[1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 7, 8, 10, 11, 2, 3]], [4])
    tree = session.propose(torch.tensor([4]))
    assert tree.tokens.tolist() == [[4, 6, 7, 8, 10]] and tree.parents.tolist() == [[-1, 0, 1, 2, 3]]
    assert tree.depths.tolist() == [[0, 1, 2, 3, 4]] and tree.longest_path == 5
    assert torch.equal(tree.mask(), torch.ones(1, 5, 5, dtype=torch.bool).tril())
    assert not tree.scores.any() and tree.scores.dtype == torch.float32
    # A shorter ending: [6] alone, whose continuation reaches the end of the text.
    session.commit(torch.empty(1, 3, 0), torch.tensor([[6, 99, 99]]), torch.tensor([1]), [1])
    assert session.propose(torch.tensor([6])).tokens.tolist() == [[6, 7, 8, 10, 11]]


def test_prompt_lookup_finds_nothing_or_little():
    assert lookup([[1, 2, 3]], [4]).propose(torch.tensor([4])).tokens.tolist() == [[4]]
    # Padding is no text, and pictures are not proposed.
    assert lookup([[5, 6, 1], [1, 2, 3, 4, 8]], [77, 20]).propose(torch.tensor([77, 20])).tokens.tolist() == [
        [77],
        [20],
    ]
    assert lookup([[1, 2, 9, 9]], [2]).propose(torch.tensor([2])).tokens.tolist() == [[2]]
    # Rows that found less are filled up to the longest.
    tree = lookup([[1, 2, 3, 4, 5], [1, 7, 8]], [2, 7]).propose(torch.tensor([2, 7]))
    assert tree.tokens.tolist() == [[2, 3, 4, 5, 2], [7, 8, 7, 7, 7]]
    # No longer than the tree may be.
    assert lookup([[1, 2, 3, 4, 5]], [2], depth=0).propose(torch.tensor([2])).tokens.tolist() == [[2, 3]]
    assert lookup([[1, 2, 3, 4, 5]], [2], total_tokens=1).propose(torch.tensor([2])).tokens.tolist() == [[2]]
    with pytest.raises(ValueError, match="longest_match must be at least 1, got 0"):
        PromptLookupDraft(longest_match=0)


@pytest.mark.parametrize(("name", "kind"), [("prompt-lookup", PromptLookupDraft), ("oracle", OracleDraft)])
def test_drafts_without_weights_have_names(families, name, kind):
    assert isinstance(vispec.load_draft(name, target=families["llava"].model), kind)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_every_chain_of_the_oracle_is_accepted_whole(families, name):
    family = families[name]
    inputs, rounds = family.prompt(0 if name == "llama" else 2, 3), []
    tree = TreeConfig(depth=12, top_k=1, total_tokens=30)
    options = {"tree": tree, "max_new_tokens": 41, "eos_token_id": None, "on_round": rounds.append}
    vispec.fast_generate(family.model, OracleDraft(), inputs, **options)
    assert [len(event.emitted[0]) for event in rounds] == [1, 14, 14, 12]


def test_the_oracle_scores_paths_as_the_target_does(families):
    """Its scores are the target's own log-probabilities, in a ragged batch with two pictures and none."""
    family = families["qwen2_5_vl"]
    prompts = [family.prompt(count, seed=20 + row, text=6 + 2 * row) for row, count in enumerate((2, 0))]
    batch, rounds = family.batch(prompts, "left"), []
    options = {"do_sample": True, "temperature": 1.0, "seed": 3, "max_new_tokens": 40}
    # A model of pictures cannot read their placeholders without one.
    options["suppress_tokens"] = specials = list(range(tiny.VISION_END, tiny.VOCABULARY))
    # It grows over more nodes than a word has bits.
    tree = TreeConfig(depth=9, top_k=8, total_tokens=40)
    vispec.fast_generate(family.model, OracleDraft(), batch, tree=tree, on_round=rounds.append, **options)
    for row, prompt in enumerate(prompts):
        before = rounds[0].emitted[row] + rounds[1].emitted[row]
        proposed = rounds[2].tree
        paths = [path for path in proposed.paths()[row] if not set(specials) & set(proposed.tokens[row, path].tolist())]
        assert max(map(len, paths)) > 2
        for path in paths:
            tokens = before[:-1] + [int(proposed.tokens[row, node]) for node in path]
            grown = torch.cat([prompt["input_ids"], torch.tensor([tokens])], dim=1)
            logits = family.model(**family.batch([{**prompt, "input_ids": grown}], "left")).logits[0]
            scores = logits.log_softmax(-1)[-len(path) : -1]
            expected = scores.gather(1, torch.tensor(tokens[1 - len(path) :])[:, None]).sum().detach()
            assert float(proposed.scores[row, path[-1]]) == pytest.approx(float(expected), abs=1e-3)


def test_prompt_lookup_gains_where_a_text_repeats_itself(families):
    """A model of two words must loop, and a loop is found."""
    model = tiny.build("llama").model
    suppressed = [token for token in range(tiny.VOCABULARY) if token not in (20, 21)]
    inputs = tiny.build("llama").prompt(0, 3)
    options = {"max_new_tokens": 60, "suppress_tokens": suppressed, "return_dict_in_generate": True}
    # The same tree every round: "auto" may find on a busy machine that guesses do not pay.
    result = vispec.fast_generate(model, PromptLookupDraft(), inputs, tree=vispec.TreeConfig(), **options)
    assert torch.equal(result.sequences, vispec.fast_generate(model, None, inputs, **options).sequences)
    assert result.stats.tau > 0.5


def test_fresh_heads_say_what_the_target_says(families):
    draft = MedusaDraft.for_target(families["llava"].model, 3)
    features = torch.randn(5, 64)
    assert all(torch.equal(draft(features, head), features) for head in range(3))
    assert isinstance(ViSpecDraft.for_target(families["llava"].model), ViSpecDraft)
