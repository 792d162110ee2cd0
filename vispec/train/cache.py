"""What the frozen target made of a sample, kept on disk, so that later epochs and later runs need not run it again.

A file a sample, named by everything that decides what is in it: the target's weights, the sample and how it is cut.
Values are stored in the dtype that the target computed them in, so that training with the cache is bit for bit
training without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vispec.prompt import Span
from vispec.targets import Target
from vispec.train.data import Sample
from vispec.train.rows import Reading

FILE_VERSION = 1
FINGERPRINT_VALUES = 256


def fingerprint(target: Target) -> str:
    """A hash of the target's weights: names, shapes, dtypes and evenly spread values of each."""
    digest = hashlib.sha256(type(target.model).__name__.encode())
    for name, parameter in sorted(target.model.named_parameters()):
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // FINGERPRINT_VALUES)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Readings of samples in a folder, up to a size limit.

    Features inside pictures are left out where the draft reads none (they come back as NaN), and embeddings where
    they are rows of the target's own table.

    Args:
        folder: made where it does not exist; several runs over the same target may share one.
        limit_bytes: nothing is added beyond it; what is there stays.
        inside_pictures: whether the draft reads features inside pictures.
        longest: what samples are cut to.
        shares: processes that add to the folder, each its share of what is free.
    """

    def __init__(
        self, folder: Path, limit_bytes: int, target: Target, *, inside_pictures: bool, longest: int, shares: int = 1
    ) -> None:
        self.folder = folder
        self.target = target
        self.inside_pictures = inside_pictures
        folder.mkdir(parents=True, exist_ok=True)
        used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        self.free_bytes = max(0, limit_bytes - used) // shares
        self.full_disk = False
        self._kind = [FILE_VERSION, fingerprint(target), inside_pictures, longest]

    def path(self, sample: Sample) -> Path:
        """Where a sample's reading lies, or would lie."""
        parts = [*self._kind, sample.text, sample.images, sample.prompt, sample.answer]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, sample: Sample) -> Reading | None:
        """A stored reading on the target's device; None where there is none, or none that is whole."""
        path = self.path(sample)
        if not path.is_file():
            return None
        try:
            stored = {name: tensor.to(self.target.device) for name, tensor in load_file(path).items()}
        except SafetensorError:
            # A power cut may leave half a file, which is written again.
            return None
        tokens, known, placed = stored["tokens"], stored["feature_rows"], stored["embedding_rows"]
        features = torch.full((len(tokens), stored["features"].shape[-1]), float("nan")).to(stored["features"])
        features[known] = stored["features"]
        with torch.no_grad():
            embeddings = self.target.embedding(tokens)
        embeddings[placed] = stored["embeddings"]
        return Reading(features, embeddings, [Span(*span) for span in stored["spans"].tolist()])

    def put(self, sample: Sample, tokens: Tensor, reading: Reading) -> None:
        """Stores a reading of tokens [S] while there is room; a full disk ends storing and nothing else."""
        if self.full_disk or not self.free_bytes:
            return
        with torch.no_grad():
            placed = (self.target.embedding(tokens) != reading.embeddings).any(-1).nonzero()[:, 0]
        known = torch.ones(reading.length, dtype=torch.bool, device=tokens.device)
        if not self.inside_pictures:
            for span in reading.spans:
                # The text behind a picture reads the feature of its last token.
                known[span.start : span.start + span.length - 1] = False
        known = known.nonzero()[:, 0]
        spans = torch.tensor([[s.start, s.length, s.frames] for s in reading.spans], dtype=torch.int64)
        tensors = {
            "tokens": tokens,
            "features": reading.features[known],
            "feature_rows": known,
            "embeddings": reading.embeddings[placed],
            "embedding_rows": placed,
            "spans": spans.reshape(-1, 3),
        }
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        if len(data) > self.free_bytes:
            self.free_bytes = 0
            return
        path = self.path(sample)
        part = path.with_suffix(f".part-{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.full_disk = True
            return
        self.free_bytes -= len(data)
