"""The draft model against plain formulas: the adaptor, the prompt's rows, the cache and the tree's masks."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import vispec
from tests import tiny
from tests.ops.conftest import available
from vispec import ops
from vispec.drafts.base import Plan
from vispec.drafts.session import DraftRuntime
from vispec.drafts.vispec import ViSpecDraftConfig
from vispec.ops import use_backend
from vispec.prompt import Span
from vispec.targets import load_target
from vispec.tree import chain_words, seen_slots


@pytest.fixture(scope="module")
def family():
    return tiny.build("llava")


def random_draft(model, queries: int = 2, seed: int = 1) -> vispec.ViSpecDraft:
    """A draft whose every weight is random, `img_fc` and biases too."""
    draft = vispec.ViSpecDraft.for_target(model, num_queries=queries)
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return draft


def naive_adaptor(adaptor, rows: torch.Tensor) -> torch.Tensor:
    """Cross-attention that projects every image row, in float64."""
    adaptor = adaptor.double()
    queries, heads, width = adaptor.q.shape
    keys = adaptor.k_proj(rows).view(-1, heads, width)
    values = adaptor.v_proj(rows).view(-1, heads, width)
    weights = torch.einsum("qhd,nhd->qhn", adaptor.q, keys).div(width**0.5).softmax(-1)
    return adaptor.o_proj(torch.einsum("qhn,nhd->qhd", weights, values).reshape(queries, -1))


@pytest.mark.parametrize("queries", (1, 2, 5))
@pytest.mark.parametrize("count", (1, 2, 37))
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_the_absorbed_adaptor_equals_the_projected_one(name, queries, count):
    adaptor = random_draft(tiny.build(name).model, queries).imadpt
    rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        actual = adaptor(rows)
        expected = naive_adaptor(adaptor, rows.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_composed_input_rows_equal_fc_and_img_fc(family):
    draft = random_draft(family.model)
    runtime = DraftRuntime(draft, load_target(family.model))
    embeddings, features, visual = torch.randn(3, 2, 7, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = draft.combine(embeddings, features, visual[:, :1].expand(-1, 7, -1))
        actual = runtime.rows(embeddings, features, runtime.constant(visual[:, 0]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_runtime_follows_the_weights(family):
    draft = random_draft(family.model)
    target = load_target(family.model)
    first = draft.runtime(target)
    assert draft.runtime(target) is first
    with torch.no_grad():
        draft.fc.weight.add_(1)
    assert draft.runtime(target) is not first


@pytest.mark.parametrize("queries", (2, 4))
def test_each_span_is_compressed_and_later_text_has_its_global_feature(family, queries):
    draft = random_draft(family.model, queries)
    generator = torch.Generator().manual_seed(4)
    embeddings, features = torch.randn(2, 30, 64, generator=generator)
    spans = [Span(5, 6), Span(14, 8)]
    with torch.inference_mode():
        rows, positions, visual = draft.prompt_rows(embeddings, features, spans)
        first, second = draft.imadpt(embeddings[4:10]), draft.imadpt(embeddings[13:21])
        zero = torch.zeros(64)

        def text(start, stop, g):
            return draft.combine(embeddings[start:stop], features[start:stop], g.expand(stop - start, -1))

        expected = torch.cat(
            [text(0, 4, zero), first[:-1], text(10, 13, first[-1]), second[:-1], text(21, 30, second[-1])]
        )
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(visual, second[-1])
    kept = queries - 1
    assert positions.tolist() == [
        *range(4), *range(10 - kept, 10), *range(10, 13), *range(21 - kept, 21), *range(21, 30)
    ]  # fmt: skip


def test_a_picture_that_opens_or_closes_the_prompt(family):
    draft = random_draft(family.model)
    embeddings, features = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        _, positions, _ = draft.prompt_rows(embeddings, features, [Span(0, 4)])
        assert positions.tolist() == [2, *range(3, 12)]
        _, positions, _ = draft.prompt_rows(embeddings, features, [Span(8, 4)])
        assert positions.tolist() == [*range(7), 10, 11]
        _, positions, _ = draft.prompt_rows(embeddings, features, [Span(0, 1), Span(6, 1)])
        assert positions.tolist() == list(range(12))


def test_a_video_gives_one_row_a_frame_and_the_mean_global_feature(family):
    draft = random_draft(family.model)
    embeddings, features = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        rows, positions, visual = draft.prompt_rows(embeddings, features, [Span(3, 12, frames=3)])
        frames = [draft.imadpt(embeddings[start : start + 4]) for start in (2, 6, 10)]
    torch.testing.assert_close(rows[2:5], torch.cat([frame[:1] for frame in frames]))
    torch.testing.assert_close(visual, torch.stack([frame[1] for frame in frames]).mean(0))
    assert positions.tolist() == [0, 1, 11, 12, 13, *range(14, 20)]


SPANS = [Span(1, 37), Span(40, 200, frames=3), Span(241, 1), Span(300, 576), Span(880, 65, frames=2)]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("queries", "heads"), ((2, 4), (3, 6)))
def test_pictures_and_frames_through_the_kernels(dtype, queries, heads):
    """At most twice the error of PyTorch span by span at the same dtype, both against the weights in float64."""
    available("emulated")
    config = ViSpecDraftConfig(192, 64, heads, 100, num_queries=queries, qkv_bias=True)
    draft = vispec.ViSpecDraft(config)
    generator = torch.Generator().manual_seed(11)
    for parameter in draft.imadpt.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.07
    draft.imadpt.q.data *= 20
    rows = torch.full((950, 192), torch.nan)
    for span in SPANS:
        rows[span.start : span.start + span.length] = torch.randn(span.length, 192, generator=generator)
    draft, rows = draft.to(dtype), rows.to(dtype)
    with torch.inference_mode():
        with use_backend("emulated"):
            kernels = draft.compress(rows, SPANS, draft.imadpt.absorbed_queries().to(dtype))
        frames = [rows[span.start : span.start + span.length].tensor_split(span.frames) for span in SPANS]
        plain = [torch.stack([draft.imadpt(frame) for frame in own]) for own in frames]
        draft = draft.double()
        exact = [torch.stack([naive_adaptor(draft.imadpt, frame.double()) for frame in own]) for own in frames]
    for (replacement, feature), usual, value in zip(kernels, plain, exact, strict=True):
        for ours, theirs, wanted in (
            (replacement, usual[:, :-1].flatten(0, 1), value[:, :-1].flatten(0, 1)),
            (feature, usual[:, -1].mean(0), value[:, -1].mean(0)),
        ):
            assert ours.shape == wanted.shape
            assert (ours - wanted).abs().max() <= 2 * (theirs - wanted).abs().max()


@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_all_pictures_of_a_batch_go_through_the_adaptor_in_one_call(name, monkeypatch):
    family = tiny.build(name)
    draft = random_draft(family.model)
    calls, own = [], ops.adaptor

    def recorded(*tensors: torch.Tensor, output: torch.Tensor) -> None:
        calls.append(len(output))
        own(*tensors, output=output)

    monkeypatch.setattr(ops, "adaptor", recorded)
    prompts = [family.prompt(2, seed=12, text=5), family.prompt(0, seed=13, text=30), family.prompt(1, seed=14, text=0)]
    with torch.inference_mode():
        target, prompt, first, session = started(family, draft, prompts)
        assert calls == [3]
        for row, length in enumerate(prompt.lengths.tolist()):
            embeddings = torch.cat([prompt.embeddings[row, 1:length], target.embedding(first[row : row + 1])])
            rows, places, visual = draft.prompt_rows(embeddings, prompt.features[row, :length], prompt.spans[row])
            torch.testing.assert_close(session._last[row], draft(rows[None], places[None])[0, -1], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                session._constant[row], session.runtime.constant(visual[None])[0], rtol=1e-4, atol=1e-4
            )


def test_without_adaptor_every_image_token_goes_in(family):
    draft = random_draft(family.model, queries=0)
    embeddings, features = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        rows, positions, visual = draft.prompt_rows(embeddings, features, [Span(2, 4)])
    assert rows.shape == (9, 64) and positions.tolist() == list(range(9)) and not visual.any()


def started(family, draft, prompts):
    """A session over a batch, with everything a formula needs to follow it."""
    target = load_target(family.model)
    inputs = family.batch(prompts, "left")
    prompt = target.prefill(inputs)
    first = prompt.logits.argmax(-1)
    return target, prompt, first, draft.start(target, prompt, first)


@pytest.mark.parametrize("queries", (0, 2))
def test_catching_up_equals_reading_all_at_once(family, queries):
    """Committing tokens in two pieces leaves the draft where one longer prefill would."""
    draft = random_draft(family.model, queries)
    plan = Plan(vispec.TreeConfig(depth=1, top_k=2, total_tokens=4))
    prompts = [family.prompt(1, seed=8, text=5), family.prompt(1, seed=9, text=8)]
    generator = torch.Generator().manual_seed(10)
    with torch.inference_mode():
        target, prompt, first, session = started(family, draft, prompts)
        features = torch.randn(2, 5, 64, generator=generator)
        tokens = torch.randint(3, 100, (2, 5), generator=generator)
        session.propose(first, plan)
        session.commit(features[:, :2], tokens[:, :2], torch.tensor([2, 1]), [2, 1])
        session.propose(first, plan)
        late = torch.stack([features[0, 2:5], features[1, 1:4]])
        late_tokens = torch.stack([tokens[0, 2:5], tokens[1, 1:4]])
        session.commit(late, late_tokens, torch.tensor([3, 3]), [3, 3])
        for row, new in enumerate((5, 4)):
            length = int(prompt.lengths[row])
            embeddings = torch.cat([
                prompt.embeddings[row, 1:length],
                target.embedding(first[row : row + 1]),
                target.embedding(tokens[row, :new]),
            ])  # fmt: skip
            known = torch.cat([prompt.features[row, :length], features[row, :new]])
            rows, places, _ = draft.prompt_rows(embeddings, known, prompt.spans[row])
            expected = draft(rows[None], places[None])[0, -1]
            torch.testing.assert_close(session._last[row], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", ((3, 4, 20), (2, 8, 30), (4, 2, 12), (5, 12, 120)))
def test_every_nodes_score_is_its_own_paths(family, sizes):
    """A node's score equals the sum of log-probabilities along its path, computed with no tree and no cache."""
    draft = random_draft(family.model)
    tree_config = vispec.TreeConfig(*sizes)
    prompts = [family.prompt(1, seed=8, text=5), family.prompt(2, seed=9, text=8)]
    with torch.inference_mode():
        target, prompt, first, session = started(family, draft, prompts)
        tree = session.propose(first, Plan(tree_config))
        for row in range(2):
            length = int(prompt.lengths[row])
            embeddings = torch.cat([prompt.embeddings[row, 1:length], target.embedding(first[row : row + 1])])
            rows, places, visual = draft.prompt_rows(embeddings, prompt.features[row, :length], prompt.spans[row])
            paths = tree.paths()[row]
            assert max(len(path) for path in paths) == tree.longest_path
            for path in paths[:: max(1, len(paths) // 8)]:
                hidden, positions = rows, places
                output, score = draft(hidden[None], positions[None])[0, -1], 0.0
                for node in path[1:]:
                    token = tree.tokens[row, node]
                    score += float(target.head(output).log_softmax(-1)[token])
                    assert float(tree.scores[row, node]) == pytest.approx(score, rel=1e-3, abs=1e-3)
                    new = draft.combine(target.embedding(token), output, visual)
                    hidden = torch.cat([hidden, new[None]])
                    positions = torch.cat([positions, positions[-1:] + 1])
                    output = draft(hidden[None], positions[None])[0, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_and_catch_up_read_the_cache_through_the_kernel(dtype, monkeypatch):
    """Against PyTorch's attention from a dense mask: both as near to float32, over slots that are not positions."""
    available("emulated")
    family = tiny.build("llava", hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    exact = vispec.ViSpecDraft.for_target(family.model)
    prompts = [family.prompt(1, seed=12, text=5), family.prompt(0, seed=13, text=30)]
    offsets = []
    own = ops.tree_attention

    def recorded(*tensors, **named):
        offsets.append(named["offset"])
        own(*tensors, **named)

    def in_dtype(kind):
        def batch(rows, side):
            inputs = family.batch(rows, side)
            return {name: value.to(kind) if value.is_floating_point() else value for name, value in inputs.items()}

        return batch

    def outputs(draft, model, backend):
        """What three levels and a catch-up pass of ragged counts give."""
        with torch.inference_mode(), use_backend(backend):
            _, _, first, session = started(SimpleNamespace(model=model, batch=in_dtype(model.dtype)), draft, prompts)
            generator = torch.Generator().manual_seed(1)
            found, ancestors = [], torch.tensor([[[1], [2], [4], [8]]]).repeat(2, 1, 1)
            for level in range(3):
                tokens = torch.randint(3, tiny.VOCABULARY, (2, 4), generator=generator)
                parents = torch.randn(2, 4, 128, generator=generator).to(draft.fc.weight.dtype)
                found.append(session._level(level, tokens, parents, ancestors))
                own_bits = 1 << 4 * (level + 1) + torch.arange(4)[:, None]
                ancestors = ancestors.roll(1, 1) | own_bits
            features = torch.randn(2, 3, 128, generator=generator).to(draft.fc.weight.dtype)
            session.commit(features, first[:, None].expand(-1, 3), torch.tensor([3, 1]), [3, 1])
            return [output.float() for output in (*found, session._last)]

    true = outputs(exact, family.model, "reference")
    model, draft = copy.deepcopy(family.model).to(dtype), copy.deepcopy(exact).to(dtype)
    dense = outputs(draft, model, "reference")
    monkeypatch.setattr(ops, "tree_attention", recorded)
    kernel = outputs(draft, model, "emulated")
    assert offsets == [0, 4, 8, 0]
    for ours, theirs, wanted in zip(kernel, dense, true, strict=True):
        assert (ours - wanted).abs().mean() < 1.3 * (theirs - wanted).abs().mean()


@pytest.mark.parametrize("slots", [1, 63, 64, 65, 130])
def test_words_are_the_masks_bits(slots):
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 5, (slots + 63) // 64))
    seen = seen_slots(words, slots)
    assert seen.shape == (2, 5, slots) and seen.dtype == torch.bool
    for place in range(slots):
        assert torch.equal(seen[:, :, place], (words[:, :, place // 64] >> (place % 64)) & 1 == 1)


@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 128, 130])
def test_a_node_of_a_chain_sees_all_before_it(nodes):
    words = chain_words(2, nodes, torch.device("cpu"))
    assert words.shape == (2, nodes, (nodes + 63) // 64) and words.is_contiguous()
    assert torch.equal(seen_slots(words, nodes), torch.ones(2, nodes, nodes, dtype=torch.bool).tril())
    # Nor anything behind the chain's end.
    assert not seen_slots(words, words.shape[2] * 64)[:, :, nodes:].any()
