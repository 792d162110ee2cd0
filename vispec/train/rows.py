"""Teacher-forced training: what the frozen target read, and the draft's passes over it.

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

from vispec.drafts import ViSpecDraft
from vispec.prompt import Span
from vispec.targets import Target
from vispec.train.data import Sample

NOISE_WIDTH = 0.2
NOISE_LENGTH = 512


@dataclass
class Reading:
    """What the target made of a batch of samples, padded on the right.

    Attributes:
        tokens: [B, S] int64.
        lengths: tokens of each sample.
        features: [B, S, C], the decoder's output after its final norm.
        embeddings: [B, S, C], the rows that the decoder read, pictures merged.
        spans: pictures of each sample, in order.
    """

    tokens: Tensor
    lengths: list[int]
    features: Tensor
    embeddings: Tensor
    spans: list[list[Span]]


def read_target(target: Target, inputs: Mapping[str, Tensor]) -> Reading:
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
    tokens = inputs["input_ids"]
    spans = target.spans(tokens, lengths, inputs)
    return Reading(tokens, lengths.tolist(), captured.features, captured.embeddings, spans)


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


def draft_passes(
    draft: ViSpecDraft,
    reading: Reading,
    supervised: Sequence[range],
    *,
    passes: int = 1,
    noises: Sequence[Tensor] | None = None,
    checkpointed: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Runs the draft over whole samples: once on the target's features, then on its own output.

    In every pass after the first, a row reads the output of the row before it where it read the target's feature
    (the first row keeps that one): this is what drafting does from its second level on. Gradients flow through.

    Args:
        supervised: for each sample the rows that count.
        passes: 1 + mtp_steps.
        noises: for each sample noise [S_b, C] on the features of the first pass.
        checkpointed: computes the layer again in the backward pass instead of keeping it.

    Returns: for each pass the predicted features [N, C] of the supervised rows, sample by sample; and the target's
    features [N, C] that they predict.
    """
    weight = draft.fc.weight
    counts = [length - 1 for length in reading.lengths]
    wanted, embeddings, features = [], [], []
    for index, count in enumerate(counts):
        known = reading.features[index, :count].to(weight.dtype)
        if noises is not None:
            known = known + noises[index][:count].to(known)
        features.append(known)
        embeddings.append(reading.embeddings[index, 1 : count + 1].to(weight.dtype))
        rows = supervised[index]
        wanted.append(reading.features[index, rows.start + 1 : rows.stop + 1])
    predicted: list[Tensor] = []
    for number in range(passes):
        rows, places = [], []
        for index in range(len(counts)):
            row, place, _ = draft.prompt_rows(embeddings[index], features[index], reading.spans[index])
            rows.append(row)
            places.append(place)
        hidden = pad_sequence(rows, batch_first=True)
        positions = pad_sequence(places, batch_first=True)
        # Padding lies behind every row, where a causal layer does not look.
        output = checkpoint(draft, hidden, positions, use_reentrant=False) if checkpointed else draft(hidden, positions)
        kept = []
        for index, place in enumerate(places):
            own = output[index, : len(place)]
            kept.append(own[(place >= supervised[index].start) & (place < supervised[index].stop)])
            if number + 1 < passes:
                # A compressed row stands for the end of its span, so the row after it reads its output.
                features[index] = features[index].index_copy(0, place[:-1] + 1, own[:-1].to(features[index].dtype))
        predicted.append(torch.cat(kept))
    return predicted, torch.cat(wanted)
