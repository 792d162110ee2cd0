"""The draft against numbers recorded from the published ViSpec code.

Each folder under $VISPEC_GOLDEN_DIR (default: tests/golden) holds a draft in the published layout, the tree's
sizes, and inputs and outputs of a prefill and three further rounds, with and without a picture.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.drafts.base import Plan
from vispec.drafts.checkpoint import _config, _fill, _read_tensors
from vispec.drafts.vispec import ViSpecDraft
from vispec.prompt import Prompt, Span
from vispec.tree import DraftTree, TreeConfig

ROOT = Path(os.environ.get("VISPEC_GOLDEN_DIR", Path(__file__).parent / "golden"))
FOLDERS = sorted(path.parent for path in ROOT.glob("*/golden.safetensors"))
SCENES = ("image", "text")


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name, scope="module")
def golden(request):
    """The recorded tensors, the draft, and the parts of a target that a draft session uses."""
    folder = request.param
    tensors = _read_tensors(folder)
    embedding = torch.nn.Embedding.from_pretrained(tensors.pop("embed_tokens.weight"))
    draft = ViSpecDraft(_config(json.loads((folder / "config.json").read_text()), tensors, folder))
    _fill(draft, tensors, folder)
    recorded = load_file(folder / "golden.safetensors")
    sizes = json.loads((folder / "tree.json").read_text())
    assert draft.config.num_queries == sizes["num_q"]
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = torch.nn.Parameter(recorded["lm_head.weight"])
    return SimpleNamespace(
        draft=draft.eval(),
        recorded=recorded,
        target=SimpleNamespace(embedding=embedding, head=head),
        tree=TreeConfig(sizes["depth"], sizes["top_k"], sizes["total_tokens"]),
    )


def spans_of(mask: torch.Tensor) -> list[Span]:
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = (torch.nonzero(edges == value)[:, 0].tolist() for value in (1, -1))
    return [Span(start, end - start) for start, end in zip(starts, ends, strict=True)]


def start_session(golden, scene: str):
    """A draft session that has read the recorded prompt."""
    recorded = {name.removeprefix(f"{scene}.prefill."): value for name, value in golden.recorded.items()}
    tokens = recorded["input_ids"]
    count = recorded["hidden_states"].shape[1]
    lengths = torch.tensor([count])
    prompt = Prompt(
        tokens=tokens[:, :count],
        lengths=lengths,
        features=recorded["hidden_states"],
        embeddings=recorded["inputs_embeds"],
        logits=torch.empty(0),
        next_positions=lengths,
        spans=[spans_of(recorded["image_mask"][0])],
        cache=KeyValueCache(lengths, [], []),
    )
    with torch.inference_mode():
        session = golden.draft.start(golden.target, prompt, tokens[:, -1])
    return session, recorded


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


def test_golden_vectors_are_there():
    assert FOLDERS, f"no golden vectors under {ROOT}"


def test_adaptor_output(golden):
    rows = golden.recorded["image.adaptor.input"][0]
    with torch.inference_mode():
        close(golden.draft.imadpt(rows), golden.recorded["image.adaptor.output"][0])


@pytest.mark.parametrize("scene", SCENES)
def test_prefill_hidden_keys_and_values(golden, scene):
    session, recorded = start_session(golden, scene)
    close(session._last, recorded["draft_hidden_last"])
    used = recorded["draft_keys"].shape[2]
    assert session.cache.host_lengths == [used]
    close(session.cache.keys[0][:, :, :used], recorded["draft_keys"])
    close(session.cache.values[0][:, :, :used], recorded["draft_values"])
    assert session._positions.tolist() == recorded["next_position"].tolist()


@pytest.mark.parametrize("scene", SCENES)
def test_trees_and_accepted_paths_of_four_rounds(golden, scene):
    session, recorded = start_session(golden, scene)
    tokens = recorded["input_ids"]
    root = tokens[:, -1]
    length = torch.tensor([tokens.shape[1] - 1])
    with torch.inference_mode():
        check_tree(session.propose(root, Plan(golden.tree)), golden.recorded, f"{scene}.round0")
        for number in range(1, 4):
            name = f"{scene}.round{number}"
            tree = session.propose(root, Plan(golden.tree))
            path, emitted, counts = accept(golden.recorded[f"{name}.target_logits"], tree, length)
            kept = int(counts)
            check_accepted(golden.recorded, name, tree, path[0, :kept], emitted[0, :kept])
            session.commit(golden.recorded[f"{name}.hidden_states"], emitted[:, :kept], counts, [kept])
            root, length = emitted[:, kept - 1], length + kept
            check_tree(session.propose(root, Plan(golden.tree)), golden.recorded, name)


def accept(logits: torch.Tensor, tree: DraftTree, length: torch.Tensor):
    path = torch.empty(1, tree.longest_path, dtype=torch.int64)
    emitted, counts, status = torch.empty_like(path), torch.empty_like(length), torch.empty_like(length)
    ops.accept(
        logits,
        tree.tokens,
        tree.parents,
        length,
        end_tokens=torch.empty(0, dtype=torch.int64),
        remaining=torch.tensor([1000]),
        finished=torch.zeros_like(length),
        path=path,
        emitted=emitted,
        counts=counts,
        status=status,
    )
    assert status.tolist() == [0]
    return path, emitted, counts


def check_tree(tree: DraftTree, recorded: dict, name: str) -> None:
    assert tree.tokens.tolist() == recorded[f"{name}.draft_tokens"].tolist()
    assert tree.depths[0].tolist() == recorded[f"{name}.tree_position_ids"].tolist()
    assert torch.equal(tree.mask()[:, None], recorded[f"{name}.tree_mask"])
    expected = [[node for node in path if node >= 0] for path in recorded[f"{name}.retrieve_indices"].tolist()]
    assert sorted(tree.paths()[0]) == sorted(expected)


def check_accepted(recorded: dict, name: str, tree: DraftTree, path: torch.Tensor, emitted: torch.Tensor) -> None:
    assert len(path) - 1 == int(recorded[f"{name}.accept_length"])
    # The recorded accepted tokens begin with the root and leave out the bonus token.
    assert tree.tokens[0, path].tolist() == recorded[f"{name}.accepted_tokens"].tolist()
    assert int(emitted[-1]) == int(recorded[f"{name}.bonus_token"])
