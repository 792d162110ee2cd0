"""`exact="self"`: speculation gives plain decoding's own bits, whatever the draft and the tree."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import vispec
from tests import tiny
from tests.ops.cases import tree_of
from tests.ops.conftest import available
from tests.replay import DeviceReplayDraft, ReplayDraft
from tests.tape import Captures
from tests.test_families import MLA_SIZES, text_model, words
from vispec import cache as caching
from vispec import ops
from vispec.decode import graph, replay
from vispec.ops import use_backend
from vispec.targets import base, check_rows, load_target, row_exact
from vispec.targets.fused import FusedDecoder
from vispec.tree import DraftTree, TreeConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENDLESS = {"eos_token_id": tiny.VOCABULARY + 1}
STEPS = 12


def rounded(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: part.to(dtype) if part.is_floating_point() else part for name, part in inputs.items()}


def prompts(family: tiny.Family, dtype: torch.dtype) -> tuple[dict, list[tuple]]:
    """A ragged batch and its rows without padding; paths of the longer one pass the first place that can be sealed."""
    pictures = family.name in tiny.VISION_FAMILIES
    # 104 tokens in the longer row, whatever its picture takes.
    texts = (5, 104)
    if pictures:
        size = family.prompt(1, seed=21, text=1)["input_ids"].shape[1] - 2
        texts = (5, (104 - size) // 2)
    made = [family.prompt(row if pictures else 0, seed=20 + row, text=text) for row, text in enumerate(texts)]
    keys = [tuple(prompt["input_ids"][0].tolist()) for prompt in made]
    return rounded(family.batch(made, "left"), dtype), keys


PRODUCTS = """
import torch
torch.manual_seed(0)
threads = torch.get_num_threads()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for K, N in ((64, 64), (96, 64), (64, 151), (257, 131), (576, 192), (1024, 512)):
        rows, order = torch.randn(1, 48, K).to(dtype), torch.randperm(48)
        weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
        for more in ((), (bias,)):
            found = torch.nn.functional.linear(rows, weight, *more)[:, order]
            again = torch.nn.functional.linear(rows[:, order].contiguous(), weight, *more)
            assert torch.equal(found, again), (dtype, K, N, threads)
"""


@pytest.mark.parametrize("instructions", ["the best there are", "AVX2"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_48_does_not_depend_on_its_place(instructions, threads):
    """What passes rely on, of PyTorch's products on this machine, and of those where there is no AVX-512."""
    names = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA") if instructions == "AVX2" else ()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **dict.fromkeys(names, "AVX2")}
    subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, check=True, timeout=300)


def tree_with(path: Tensor, nodes: int, seed: int) -> tuple[DraftTree, Tensor]:
    """A random tree of so many nodes in which `path` [B, D] of tokens is one, and that path's nodes [B, D]."""
    batch, depth = path.shape
    generator = torch.Generator().manual_seed(seed)
    tree = tree_of(batch, nodes, tiny.VISION_END, seed)
    own = torch.zeros(batch, depth, dtype=torch.int64)
    for row in range(batch):
        own[row, 1:] = torch.randperm(nodes - 1, generator=generator)[: depth - 1].sort().values + 1
        parents = tree.parents[row].tolist()
        for place, node in enumerate(own[row].tolist()):
            parents[node] = int(own[row, place - 1]) if place else -1
            tree.tokens[row, node] = path[row, place]
        seen: list[int] = []
        for node, parent in enumerate(parents):
            seen.append(1 << node | (seen[parent] if parent >= 0 else 0))
            tree.depths[row, node] = tree.depths[row, parent] + 1 if parent >= 0 else 0
        tree.parents[row], tree.ancestors[row, :, 0] = torch.tensor(parents), torch.tensor(seen)
    return tree, own


@torch.inference_mode()
def plain_steps(target, inputs: dict) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Greedy plain decoding: the tokens read [B, D], their logits [B, D, V], and every layer's keys and values."""
    prompt = target.prefill(inputs)
    cache, positions, roots = prompt.cache, prompt.next_positions, prompt.logits.argmax(-1)
    tokens, logits, ones = [], [], torch.ones_like(roots)
    for _ in range(STEPS):
        tokens.append(roots)
        found, _ = target.verify(DraftTree.root_only(roots), positions, cache)
        logits.append(found[:, 0])
        cache.advance(ones, [1] * len(roots))
        positions, roots = positions + 1, found[:, 0].argmax(-1)
    slots = prompt.lengths[:, None] + torch.arange(STEPS)
    return torch.stack(tokens, 1), torch.stack(logits, 1), stored(cache, slots)


def stored(cache, slots: Tensor) -> list[Tensor]:
    """What every layer holds at slots [B, D]."""
    rows = torch.arange(len(slots))[:, None]
    return [store[rows, :, slots] for store in (*cache.keys, *cache.values)]


@torch.inference_mode()
def from_tree(target, inputs: dict, path: Tensor, nodes: int, committed: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The same from one pass over a tree, `committed` tokens of the path read before it, each row in its place."""
    prompt = target.prefill(inputs)
    cache, positions = prompt.cache, prompt.next_positions
    if committed:
        chain, _ = tree_with(path[:, :committed], committed, seed)
        target.verify(chain, positions, cache)
        cache.advance(torch.full_like(positions, committed), [committed] * len(positions))
    tree, own = tree_with(path[:, committed:], nodes, seed)
    logits, _ = target.verify(tree, positions + committed, cache)
    picked = logits.gather(1, own[:, :, None].expand(-1, -1, logits.shape[2]))
    return picked, stored(cache, cache.lengths[:, None] + own)


def same_bits(target, inputs: dict) -> bool:
    """Whether trees of several kinds give the logits, keys and values of plain steps."""
    path, logits, caches = plain_steps(target, inputs)
    good = True
    for seed, (nodes, committed) in enumerate(((48, 0), (17, 5), (STEPS, 0), (30, 1))):
        found, kept = from_tree(target, inputs, path, nodes, committed, seed)
        good &= torch.equal(found, logits[:, committed:])
        good &= all(torch.equal(new, old[:, committed:]) for new, old in zip(kept, caches, strict=True))
    return good


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_pass_over_a_tree_has_the_bits_of_plain_steps(name, dtype):
    family = tiny.build(name)
    inputs, _ = prompts(family, dtype)
    target = load_target(family.model.to(dtype))
    assert same_bits(row_exact(target), inputs)
    assert not target.row_exact
    if dtype is torch.float32:
        assert not same_bits(target, inputs), "other passes have not, or nothing is shown here"


@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_have_them_too(monkeypatch, fused):
    """Emulated: a decoder with our kernels between its layers, and its own layers with our attention."""
    available("emulated")
    if not fused:
        monkeypatch.setattr(FusedDecoder, "of", lambda decoder: None)
    family = tiny.build(
        "qwen2_5_vl", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2
    )
    inputs, _ = prompts(family, torch.bfloat16)
    target = row_exact(load_target(family.model.bfloat16()))
    calls = []
    real = ops.path_attention
    monkeypatch.setattr(ops, "path_attention", lambda *tensors, **named: (calls.append(1), real(*tensors, **named)))
    with use_backend("emulated"):
        path, logits, caches = plain_steps(target, inputs)
        found, kept = from_tree(target, inputs, path, nodes=20, committed=2, seed=0)
    assert torch.equal(found, logits[:, 2:])
    assert all(torch.equal(new, old[:, 2:]) for new, old in zip(kept, caches, strict=True))
    assert len(calls) == 2 * (STEPS + 2)


class Penalty(LogitsProcessor):
    """Depends on the whole history, and so on the node."""

    def __call__(self, input_ids, scores):
        return scores - 0.5 * torch.zeros_like(scores).scatter(1, input_ids, 1.0)


OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.4, "top_k": 40, "top_p": 0.95, "seed": [3, 2**64 - 1]},
    "processed": {"logits_processor": LogitsProcessorList([Penalty()])},
}
TREES = {"default": TreeConfig(), "deep": TreeConfig(depth=14, top_k=2, total_tokens=48), "auto": "auto"}


@pytest.mark.parametrize(
    ("name", "dtype", "option"),
    [
        ("llava", torch.bfloat16, "greedy"),
        ("qwen2_5_vl", torch.bfloat16, "sampled"),
        ("llava_next", torch.float16, "sampled"),
        ("llama", torch.float32, "sampled"),
        ("qwen2", torch.bfloat16, "processed"),
    ],
)
def test_answers_are_those_of_plain_decoding(monkeypatch, name, dtype, option):
    for module, name_there in ((graph, "TOKENS_AHEAD"), (caching, "GROWTH_SLOTS"), (base, "GROWTH_SLOTS")):
        monkeypatch.setattr(module, name_there, 8)  # caches without slots to spare
    family = tiny.build(name, num_hidden_layers=2)
    family.model.to(dtype)
    inputs, keys = prompts(family, dtype)
    options = {"max_new_tokens": 28, "exact": "self", **ENDLESS, **OPTIONS[option]}
    expected = vispec.fast_generate(family.model, None, inputs, **options)
    new = expected[:, inputs["input_ids"].shape[1] :]
    known = dict(zip(keys, new.tolist(), strict=True))
    runs = [(ReplayDraft(known, tiny.VOCABULARY, hit_rate=0.95), tree, {}) for tree in TREES.values()]
    runs.append((vispec.ViSpecDraft.for_target(family.model), "auto", {}))
    if option != "processed":
        late = {"graphs": True}
        runs += [(None, "auto", late), (DeviceReplayDraft(new, tiny.VOCABULARY, miss_every=6), "auto", late)]
    for draft, tree, more in runs:
        result = vispec.fast_generate(
            family.model, draft, inputs, tree=tree, return_dict_in_generate=True, **options, **more
        )
        assert torch.equal(result.sequences, expected), (type(draft).__name__, tree, more)
        assert max(result.stats.nodes_per_round) <= ops.PATH_NODES
        if isinstance(draft, ReplayDraft) and tree != "auto":
            assert result.stats.tau > 1.5


@pytest.mark.parametrize("sampled", [False, True])
def test_replayed_rounds_have_them_too(monkeypatch, sampled):
    """The rounds of a later call, and one of another level between them, which must not share them."""
    made = Captures()
    monkeypatch.setattr(replay, "can_capture", lambda device: True)
    monkeypatch.setattr(replay, "capture", made)
    family = tiny.build("llama", num_hidden_layers=2)
    family.model.bfloat16()
    inputs, _ = prompts(family, torch.bfloat16)
    options = {"max_new_tokens": 24, **ENDLESS, **(OPTIONS["sampled"] if sampled else {})}
    with use_backend("reference"):
        expected = vispec.fast_generate(family.model, None, inputs, exact="self", graphs=False, **options)
        new = expected[:, inputs["input_ids"].shape[1] :]
        draft = DeviceReplayDraft(new, tiny.VOCABULARY, miss_every=5)
        captures = []
        for exact in ("self", "law", "self"):
            got = vispec.fast_generate(
                family.model, draft, inputs, exact=exact, tree=TreeConfig(), graphs=True, **options
            )
            captures.append(made.count)
            if exact == "self":
                assert torch.equal(got, expected)
    assert captures == [1, 2, 2] and made.replays > 6


def test_padding_is_copies_of_the_root():
    tree = tree_of(2, 5, tiny.VOCABULARY)
    padded = tree.padded(48)
    assert padded.size == 48 and padded.longest_path == tree.longest_path
    for part in ("tokens", "parents", "depths", "ancestors", "scores"):
        assert torch.equal(getattr(padded, part)[:, :5], getattr(tree, part))
    assert torch.equal(padded.tokens[:, 5:], tree.tokens[:, :1].expand(2, 43))
    assert (padded.depths[:, 5:] == 0).all() and (padded.parents[:, 5:] == -1).all()
    assert torch.equal(padded.mask()[:, 5:], torch.eye(48, dtype=torch.bool)[5:].expand(2, -1, -1))


def refused(model, match: str) -> None:
    tokens = words(12, seed=1)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with pytest.raises(ValueError, match=match):
        vispec.fast_generate(model, None, inputs, exact="self", max_new_tokens=2, do_sample=False)


def with_rope(kind: str):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    return text_model("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": rope})


def test_models_in_which_a_row_depends_on_the_others_are_refused():
    refused(with_rope("dynamic"), 'exact="self" needs rotary frequencies that do not depend on the pass, got dynamic')
    refused(
        text_model("MixtralConfig", "MixtralForCausalLM", {"sliding_window": None}),
        "needs layers without experts, got num_",
    )


def test_layers_that_the_op_does_not_serve_are_refused():
    for config, model, sizes in (
        ("FalconConfig", "FalconForCausalLM", {}),  # reads the mask itself
        ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**MLA_SIZES, "n_routed_experts": 1}),  # keys wider than values
    ):
        made = text_model(config, model, sizes)
        target = copy.copy(load_target(made))
        target.row_exact = True
        tokens = words(12, seed=1)[None]
        prompt = target.prefill({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        with torch.inference_mode(), pytest.raises(ValueError, match="needs layers of plain softmax attention"):
            target.verify(DraftTree.root_only(tokens[:, 0]), prompt.next_positions, prompt.cache)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda output: output + output.amax(),  # one scale for all rows, as in some quantised layers
        lambda output: output * (1 + 1e-6 * torch.arange(output.shape[1])[:, None]),  # depends on the row
        lambda output: output + torch.nan,
    ],
)
def test_passes_that_do_not_keep_rows_apart_are_noticed(mixed):
    family = tiny.build("llama", num_hidden_layers=2)
    prompt = family.prompt(0, seed=3)
    target = row_exact(load_target(family.model))
    with torch.inference_mode():
        read = target.prefill(prompt)
        check_rows(target, read)
        assert read.cache.host_lengths == [prompt["input_ids"].shape[1]]
        family.model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: mixed(output))
        with pytest.raises(ValueError, match="no row depends on its place or on the others"):
            check_rows(target, read)
    refused(family.model, "no row depends on its place or on the others")


def test_trees_that_are_too_large_are_refused():
    family = tiny.build("llama", num_hidden_layers=1)
    prompt, draft = family.prompt(0, seed=3), vispec.ViSpecDraft.for_target(family.model)
    tree = TreeConfig(depth=6, top_k=8, total_tokens=49)
    with pytest.raises(ValueError, match='tree must have at most 48 nodes with exact="self", got 49'):
        vispec.fast_generate(family.model, draft, prompt, tree=tree, exact="self", max_new_tokens=3)
    target = row_exact(load_target(family.model))
    read = target.prefill(prompt)
    with pytest.raises(ValueError, match="target: a tree must have at most 48 nodes, got 49"):
        target.verify(tree_of(1, 49, tiny.VISION_END), read.next_positions, read.cache)
