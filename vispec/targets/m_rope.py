"""Qwen2-VL and its kin: three rotary positions a token (M-RoPE), videos in frames, a remembered rope delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from vispec.prompt import Span
from vispec.targets.base import Target


class MRopeTarget(Target):
    """Adds what differs: M-RoPE positions, frames of a video, and the model's `rope_deltas` put back."""

    @contextmanager
    def session(self) -> Iterator[None]:
        inner = self.model.model
        remembered = inner.rope_deltas
        inner.rope_deltas = None
        try:
            with super().session():
                yield
        finally:
            inner.rope_deltas = remembered

    def prefill_positions(self, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """With pictures the model counts for itself; without, all three rows are the text's own count."""
        if inputs.get("image_grid_thw") is not None or inputs.get("video_grid_thw") is not None:
            return {}
        positions = super().prefill_positions(inputs, mask)["position_ids"]
        return {"position_ids": positions.expand(3, -1, -1)}

    def verify_positions(self, positions: Tensor) -> Tensor:
        """Text tokens have three equal positions: [B, T] to [3, B, T]."""
        return positions.expand(3, -1, -1)

    def spans(self, tokens: Tensor, lengths: Tensor, inputs: Mapping[str, Tensor]) -> list[list[Span]]:
        """Splits each video span into its frames (temporal patches), as many as `video_grid_thw` says."""
        rows = super().spans(tokens, lengths, inputs)
        grids = inputs.get("video_grid_thw")
        if grids is None:
            return rows
        frames = iter(grids[:, 0].tolist())
        video = self.model.config.video_token_id
        return [
            [replace(span, frames=next(frames)) if tokens[index, span.start] == video else span for span in row]
            for index, row in enumerate(rows)
        ]
