"""A preallocated key-value cache whose rows have lengths of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vispec import ops

GROWTH_SLOTS = 256


class KeyValueCache:
    """Keys and values of every layer, [B, G, L, D] each, written in place at each row's own length.

    A *slot* is an index into L and says nothing about the position that a rotary embedding used: rows hold
    their tokens without padding, slots [0, lengths[b]) are committed, and what lies beyond is finite but
    meaningless. `begin` announces a pass over T new tokens a row, which writes the slots behind the committed
    ones; `commit` or `advance` makes some of them permanent, the rest is forgotten.

    The object is passed to Hugging Face decoders as ``past_key_values``: `update` and `get_seq_length` are all
    that they call when position ids and a four-dimensional mask come from outside.

    After `fix` the lengths are the device's business alone: a pass then reads and masks the whole capacity, which is
    what a CUDA graph can replay.

    Attributes:
        lengths: [B] int64 on the device, changed in place; `host_lengths` is the host's copy, so that nothing waits to
            read it, or None after `fix`.
        offset: slots between the committed ones and those of the present pass.
    """

    def __init__(self, lengths: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys = keys
        self.values = values
        self.lengths = lengths.clone()
        self.host_lengths: list[int] | None = lengths.tolist()
        self.offset = 0
        self._first = 0
        self._used = 0
        self._slots: Tensor | None = None
        self._starts: Tensor | None = None
        self._movable: list[tuple[list[Tensor], Tensor | None]] | None = None

    @classmethod
    def from_prefill(
        cls, layers: list[tuple[Tensor, Tensor]], rows: Tensor, lengths: Tensor, capacity: int
    ) -> KeyValueCache:
        """Takes over the keys and values of a prefill, leaving out its padding.

        Shapes: each layer's pair [B, G, S, D]; `rows` [B, S'] int64, the slot in [0, S) of every kept token of a
        row, in order (anything beyond lengths[b]); `lengths` [B] int64. `layers` is emptied one by one, so that
        no more than one layer is held twice.
        """
        unpadded = bool((rows == torch.arange(rows.shape[1], device=rows.device)).all())
        stores: tuple[list[Tensor], list[Tensor]] = ([], [])
        while layers:
            for source, store in zip(layers.pop(0), stores, strict=True):
                batch, heads, _, width = source.shape
                # Zeros, not empty: a masked slot still meets a weight of exactly 0, and 0 * NaN is NaN.
                target = source.new_zeros(batch, heads, capacity, width)
                kept = source[:, :, : rows.shape[1]]
                if not unpadded:
                    kept = source.gather(2, rows[:, None, :, None].expand(*kept.shape))
                target[:, :, : rows.shape[1]] = kept
                store.append(target)
        return cls(lengths, *stores)

    @classmethod
    def allocate(cls, layers: int, batch: int, heads: int, width: int, capacity: int, like: Tensor) -> KeyValueCache:
        """An empty cache in the dtype and on the device of `like`."""

        def zeros() -> list[Tensor]:
            return [like.new_zeros(batch, heads, capacity, width) for _ in range(layers)]

        return cls(torch.zeros(batch, dtype=torch.int64, device=like.device), zeros(), zeros())

    def load(self, other: KeyValueCache) -> bool:
        """Takes over what `other` has committed, in this cache's own memory; False, and nothing done, if it cannot.

        The slots beyond are zeroed: whatever a cache held before, a masked slot must be finite.
        """
        used = max(other.host_lengths)
        pairs = list(zip([*self.keys, *self.values], [*other.keys, *other.values], strict=False))
        alike = len(self.keys) == len(other.keys) and all(
            (own.shape[:2], own.shape[3], own.dtype, own.device) == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for own, new in pairs
        )
        if not alike or used > self.capacity:
            return False
        for own, new in pairs:
            own[:, :, :used] = new[:, :, :used]
            own[:, :, used:] = 0
        self.lengths.copy_(other.lengths)
        self.host_lengths = list(other.host_lengths)
        return True

    @property
    def capacity(self) -> int:
        """Slots there is memory for."""
        return self.keys[0].shape[2]

    def begin(self, tokens: int, offset: int = 0) -> Tensor:
        """Makes room for a pass over `tokens` new tokens a row, `offset` slots behind the committed ones.

        Returns their slots, [B, T] int64.
        """
        self.offset = offset
        slots = self.lengths[:, None] + torch.arange(offset, offset + tokens, device=self.lengths.device)
        self._starts = slots[:, 0]
        if self.host_lengths is None:
            self._first, self._used, self._slots = 0, self.capacity, slots
            return slots
        longest = max(self.host_lengths)
        self._first = longest + offset
        self._used = self._first + tokens
        if self._used > self.capacity:
            self._grow(max(self._used + GROWTH_SLOTS, self.capacity * 3 // 2))
        self._slots = None if min(self.host_lengths) == longest else slots
        return slots

    def mask(self, tail: Tensor, dtype: torch.dtype) -> Tensor:
        """The additive mask [B, 1, T, L'] of the present pass over the L' slots in use.

        Every token sees its row's committed slots and, of the A slots behind them up to the pass's last, those that
        `tail` [B, T, A] bool marks.
        """
        batch, tokens, width = tail.shape
        if self._slots is None:
            visible = F.pad(tail, (self._used - width, 0), value=True)
        else:
            places = torch.arange(self._used, device=tail.device)
            committed = (places < self.lengths[:, None])[:, None].expand(-1, tokens, -1)
            slots = self.lengths[:, None] + torch.arange(width, device=tail.device)
            visible = committed.scatter(2, slots[:, None].expand(batch, tokens, width), tail)
        mask = torch.zeros(visible.shape, dtype=dtype, device=tail.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values [B, G, T, D]; returns views of the slots in use."""
        for new, store in ((keys, self.keys[layer]), (values, self.values[layer])):
            if self._slots is None:
                store[:, :, self._first : self._used] = new
            else:
                rows = torch.arange(new.shape[0], device=new.device)[:, None]
                store[rows, :, self._slots] = new.transpose(1, 2)
        return self.used(layer)

    def used(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values in the slots that the present pass may read, [B, G, L', D] each."""
        return self.keys[layer][:, :, : self._used], self.values[layer][:, :, : self._used]

    def get_seq_length(self, layer: int = 0) -> int:
        """Slots before the present pass in the longest row (Hugging Face's name)."""
        return self._first

    def fix(self, capacity: int) -> None:
        """From now on only the device knows the lengths, and `capacity` slots must do until `fix` is called again."""
        if capacity > self.capacity:
            self._grow(capacity)
        self.host_lengths = None

    def commit(
        self,
        path: Tensor,
        emitted: Tensor,
        counts: Tensor,
        host_counts: list[int] | None,
        *,
        positions: Tensor,
        remaining: Tensor,
        roots: Tensor,
        gather: ops.Gather | None = None,
    ) -> None:
        """Moves the accepted nodes [B, D] of the last pass to the end of each row, and advances all that a round does.

        See `ops.commit`; `host_counts` as in `host_lengths`.
        """
        rows = ops.RowState(self.lengths, positions, remaining, roots)
        # A path of the root alone lies in its place.
        groups = self._groups() if path.shape[1] > 1 else [([], None)]
        for stores, table in groups:
            ops.commit(stores, path, emitted, counts, self._starts, table=table, rows=rows, gather=gather)
            rows = gather = None
        self._advance_host(host_counts)

    def advance(self, counts: Tensor, host_counts: list[int] | None) -> None:
        """Makes the first `counts` [B] int64 slots behind each row permanent; `host_counts` as in `host_lengths`."""
        self.lengths += counts
        self._advance_host(host_counts)

    def _advance_host(self, host_counts: list[int] | None) -> None:
        if self.host_lengths is not None:
            self.host_lengths = [length + count for length, count in zip(self.host_lengths, host_counts, strict=True)]

    def _groups(self) -> list[tuple[list[Tensor], Tensor | None]]:
        """The tensors that one launch moves, and on a GPU the table of their addresses, made once."""
        if self._movable is None:
            # Latent attention has keys and values of different widths, which one launch cannot move.
            alike = self.keys[0].shape == self.values[0].shape
            groups = [[*self.keys, *self.values]] if alike else [self.keys, self.values]
            self._movable = [(stores, ops.pointer_table(stores) if stores[0].is_cuda else None) for stores in groups]
        return self._movable

    def _grow(self, capacity: int) -> None:
        self._movable = None
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                larger = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                larger[:, :, : old.shape[2]] = old
                store[layer] = larger
