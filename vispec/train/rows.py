"""Teacher-forced training: what the frozen target read, and a draft's passes over it.

Row i of the draft pairs the target's feature of token i with the embedding of token i + 1 and predicts the feature
of token i + 1. Dimension letters: B samples, S tokens, N supervised rows, C hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from vispec.drafts import MedusaDraft, ViSpecDraft
from vispec.prompt import Span
from vispec.targets import Target
from vispec.train.data import Sample

NOISE_WIDTH = 0.2
NOISE_LENGTH = 512


@dataclass
class Reading:
    """What the target made of one sample.

    Attributes:
        features: [S, C], the decoder's output after its final norm.
        embeddings: [S, C], the rows that the decoder read, pictures merged.
        spans: its pictures, in order.
    """

    features: Tensor
    embeddings: Tensor
    spans: list[Span]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, S."""
        return len(self.features)


def read_target(target: Target, inputs: Mapping[str, Tensor]) -> list[Reading]:
    """Runs the frozen target over whole samples, prompt and answer, padded on the right; keeps no cache.

    Raises: ValueError for padding on the left.
    """
    inputs = {name: value.to(target.device) for name, value in inputs.items()}
    mask = inputs["attention_mask"]
    lengths = mask.sum(1)
    if not bool(mask[:, 0].all()):
        raise ValueError("read_target: samples must be padded on the right, got padding on the left")
    with torch.no_grad(), target.session():
        captured = target.read(inputs, use_cache=False)
    spans = target.spans(inputs["input_ids"], lengths, inputs)
    return [
        Reading(captured.features[row, :length], captured.embeddings[row, :length], spans[row])
        for row, length in enumerate(lengths.tolist())
    ]


def supervised_rows(sample: Sample, longest: int | None = None) -> range:
    """The rows of a sample that are trained: those that a generation would have asked for the answer's tokens.

    The first is the prompt's last row, which reads the answer's first token and predicts the second; none predicts
    what would follow an end token. `longest` is the limit that the sample was cut to.
    """
    length = sample.length if longest is None else min(sample.length, longest)
    ended = sample.ended and length == sample.length
    return range(len(sample.prompt) - 1, length - 2 if ended else length - 1)


def feature_noise(length: int, width: int, seed: int) -> Tensor:
    """Uniform noise [length, width] float32 on a sample's features, drawn on the CPU from its own seed.

    In (-0.1, 0.1) for 512 tokens, narrower for longer samples. Source: EAGLE (arXiv 2401.15077).
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(length, width, generator=generator) - 0.5) * (NOISE_WIDTH * NOISE_LENGTH / length)


@dataclass
class Passes:
    """What a draft said in its passes over a batch of samples, N supervised rows in all, sample by sample.

    Attributes:
        predicted: [P, N, C], the features that each pass predicts.
        wanted: [N, C], the target's features.
        counted: [P, N] bool, the rows that count in each pass; None: all.
    """

    predicted: Tensor
    wanted: Tensor
    counted: Tensor | None = None


@dataclass
class Laid:
    """One sample laid out for the draft: row i holds the feature of token i and the embedding of token i + 1."""

    features: Tensor
    embeddings: Tensor
    spans: list[Span]
    supervised: range

    @classmethod
    def out(cls, reading: Reading, supervised: range, noise: Tensor | None, dtype: torch.dtype) -> Laid:
        """Lays a sample out in the draft's dtype, with noise [S, C] on its features."""
        features = reading.features[:-1].to(dtype)
        if noise is not None:
            features = features + noise[:-1].to(features)
        return cls(features, reading.embeddings[1:].to(dtype), reading.spans, supervised)


def lay_out(
    readings: Sequence[Reading], supervised: Sequence[range], noises: Sequence[Tensor] | None, dtype: torch.dtype
) -> tuple[list[Laid], Tensor]:
    """Samples as the draft takes them, and the features [N, C] that their supervised rows predict."""
    if noises is None:
        noises = [None] * len(readings)
    laid = [Laid.out(*one, dtype) for one in zip(readings, supervised, noises, strict=True)]
    pairs = zip(readings, supervised, strict=True)
    return laid, torch.cat([reading.features[rows.start + 1 : rows.stop + 1] for reading, rows in pairs])


def whole_passes(
    draft: ViSpecDraft,
    readings: Sequence[Reading],
    supervised: Sequence[range],
    *,
    passes: int = 1,
    noises: Sequence[Tensor] | None = None,
    checkpointed: bool = False,
) -> Passes:
    """Runs the draft over whole samples: once on the target's features, then on its own output.

    In every pass after the first, each row reads the output of the row before it where it read the target's feature
    (the first row keeps that one). Gradients flow through. `chains.chain_passes` keeps closer to drafting.

    Args:
        supervised: for each sample the rows that count.
        passes: 1 + mtp_steps.
        noises: for each sample noise [S, C] on the features of the first pass.
        checkpointed: computes the layer again in the backward pass instead of keeping it.

    Source: ViSpec (arXiv 2509.15235), section 3.4.
    """
    laid, wanted = lay_out(readings, supervised, noises, draft.fc.weight.dtype)
    predicted: list[Tensor] = []
    for number in range(passes):
        rows, places = [], []
        for one in laid:
            row, place, _ = draft.prompt_rows(one.embeddings, one.features, one.spans)
            rows.append(row)
            places.append(place)
        hidden = pad_sequence(rows, batch_first=True)
        positions = pad_sequence(places, batch_first=True)
        # Padding lies behind every row, where a causal layer does not look.
        output = checkpoint(draft, hidden, positions, use_reentrant=False) if checkpointed else draft(hidden, positions)
        kept = []
        for index, (one, place) in enumerate(zip(laid, places, strict=True)):
            own = output[index, : len(place)]
            kept.append(own[(place >= one.supervised.start) & (place < one.supervised.stop)])
            if number + 1 < passes:
                # A compressed row stands for the end of its span, so the row after it reads its output.
                one.features = one.features.index_copy(0, place[:-1] + 1, own[:-1].to(one.features.dtype))
        predicted.append(torch.cat(kept))
    return Passes(torch.stack(predicted), wanted)


def medusa_passes(
    draft: MedusaDraft,
    readings: Sequence[Reading],
    supervised: Sequence[range],
    *,
    passes: int = 1,
    noises: Sequence[Tensor] | None = None,
    checkpointed: bool = False,
) -> Passes:
    """What each of the first `passes` heads says: head k of a row predicts what that row's k-th successor does.

    Arguments as for `whole_passes`. Nothing is computed in turn, so there is nothing to checkpoint. A sample's first k
    supervised rows do not count for head k, whose feature would lie in the prompt.
    """
    laid, wanted = lay_out(readings, supervised, noises, next(draft.parameters()).dtype)
    predicted, counted = [], []
    for head in range(passes):
        picked, kept = [], []
        for one in laid:
            rows = torch.arange(one.supervised.start, one.supervised.stop, device=one.features.device)
            # A row that does not count may lie in a picture, of which nothing is known.
            picked.append(one.features[(rows - head).clamp(min=one.supervised.start)])
            kept.append(rows - head >= one.supervised.start)
        predicted.append(draft(torch.cat(picked), head))
        counted.append(torch.cat(kept))
    return Passes(torch.stack(predicted), wanted, torch.stack(counted))
