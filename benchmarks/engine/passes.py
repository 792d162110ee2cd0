"""Passes by themselves: the target over more and more nodes, and the vision adaptor over one picture."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

import vispec
from benchmarks.engine.clocks import clock_of, mean_seconds
from benchmarks.engine.floors import NODES
from benchmarks.ops.tree_attention import ancestor_words
from vispec import ops
from vispec.targets import load_target
from vispec.tree import MAX_NODES, DraftTree


def star(batch: int, nodes: int, vocabulary: int, device: torch.device) -> DraftTree:
    """A root with children alone; a pass over it costs what a pass over any tree of that size does."""
    tree = DraftTree.empty(batch, nodes, min(nodes, 2), device)
    node = torch.arange(nodes, device=device)
    tree.tokens.copy_(node % vocabulary)
    tree.parents.copy_(torch.where(node > 0, 0, -1))
    tree.depths.copy_((node > 0).long())
    tree.ancestors.copy_(ancestor_words(tree.parents[0])[1])
    tree.scores.zero_()
    return tree


@torch.inference_mode()
def verify_seconds(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[int, tuple[float, bool]]:
    """`mean_seconds` of a verification pass behind these prompts, for each of `NODES`.

    Raises: FloatingPointError where a pass gives logits that are not finite.
    """
    target = load_target(model)
    clock = clock_of(target.device)
    found = {}
    with target.session():
        prompt = target.prefill(inputs)
        prompt.cache.fix(inputs["input_ids"].shape[1] + MAX_NODES)
        for nodes in NODES:
            tree = star(len(prompt.lengths), nodes, target.vocabulary, target.device)

            def verify(tree: DraftTree = tree) -> Tensor:
                return target.verify(tree, prompt.next_positions, prompt.cache)[0]

            if not bool(verify().isfinite().all()):
                raise FloatingPointError(f"bench_engine: logits of a pass over {nodes} nodes are not finite")
            found[nodes] = mean_seconds(verify, clock)
    return found


@torch.inference_mode()
def adaptor_seconds(model: PreTrainedModel, draft: vispec.ViSpecDraft, rows: int) -> tuple[float, bool]:
    """`mean_seconds` of the draft's adaptor over one picture of so many rows."""
    target = load_target(model)
    absorbed = draft.runtime(target).absorbed
    pictures = torch.randn(rows, target.hidden_size, device=target.device).to(absorbed.dtype)
    starts, lengths = (torch.tensor([value], device=target.device) for value in (0, rows))
    context = absorbed.new_empty(1, *absorbed.shape)

    def compress() -> Tensor:
        # `VisionAdaptor.compress` without its copy from the host.
        ops.adaptor(absorbed, pictures, starts, lengths, output=context)
        return draft.imadpt.project(context)

    if not torch.equal(compress(), draft.imadpt.compress(pictures, [(0, rows)], absorbed)):
        raise RuntimeError("bench_engine: the adaptor must give what the draft's own compress gives")
    return mean_seconds(compress, clock_of(target.device))
