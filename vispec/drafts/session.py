"""One generation of a ViSpec draft: its compressed cache, its catch-up pass and its tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vispec.cache import GROWTH_SLOTS, KeyValueCache
from vispec.drafts.growth import TreeGrower
from vispec.drafts.head import DraftHead
from vispec.drafts.weights import Product, rounded
from vispec.prompt import Prompt
from vispec.tree import DraftTree, TreeConfig, chain_words

if TYPE_CHECKING:
    from vispec.drafts.base import Places, Plan
    from vispec.drafts.vispec import ViSpecDraft
    from vispec.targets import Target


class DraftRuntime:
    """What is computed once from a draft's weights and used by every generation.

    `fc` and `img_fc` are multiplied out, which halves the work of a row:
    fc([e ; img_fc([f ; g])]) = We e + (Wf Wi) f + (Wf Wg) g + (Wf b_img + b), and the two last terms are constant
    between pictures. The adaptor's queries are folded with its key projection. Rounding apart these are the
    same maps, and the draft's rounding never reaches an answer. So what a round reads, the layer, its input map and
    the head, may be rounded to int8 as well; the prompt is read with the weights as they are.
    """

    def __init__(self, draft: ViSpecDraft, target: Target) -> None:
        width = draft.config.hidden_size
        self.dtype = draft.fc.weight.dtype
        weight, image = draft.fc.weight.float(), draft.img_fc.weight.float()
        through = weight[:, width:]
        inputs = torch.cat([weight[:, :width], through @ image[:, :width]], dim=1).to(self.dtype)
        self.inputs = Product(inputs, None, draft.weights)
        self.visual_weight = (through @ image[:, width:]).to(self.dtype)
        bias = through @ draft.img_fc.bias.float()
        self.input_bias = (bias if draft.fc.bias is None else bias + draft.fc.bias.float()).to(self.dtype)
        self.absorbed = None if draft.imadpt is None else draft.imadpt.absorbed_queries().to(self.dtype)
        self.layer = rounded(draft.layers[0], draft.weights)
        self.head = DraftHead(target.head, draft.head_tokens, draft.weights)

    def constant(self, visual: Tensor) -> Tensor:
        """What the global features [B, C] add to every later row, [B, 1, C]."""
        return F.linear(visual, self.visual_weight, self.input_bias)[:, None]

    def rows(self, embeddings: Tensor, features: Tensor, constant: Tensor) -> Tensor:
        """Input rows of the layer, [B, M, C]."""
        return self.inputs(torch.cat([embeddings, features], -1)) + constant


class ViSpecSession:
    """See `vispec.drafts.base.DraftSession`.

    Slots count the compressed sequence, positions the uncompressed one; they never mix. The last row's output of
    a pass (`_last`, [B, C]) predicts the children of the next root.
    """

    def __init__(self, draft: ViSpecDraft, target: Target, prompt: Prompt, first_tokens: Tensor) -> None:
        self.draft = draft
        self.runtime = draft.runtime(target)
        self.embedding = target.embedding
        self._prefill(prompt, first_tokens)

    def _prefill(self, prompt: Prompt, first_tokens: Tensor) -> None:
        first = self.embedding(first_tokens)
        # The spans of all rows in one pass over the embeddings as they lie.
        width = prompt.embeddings.shape[1]
        spans = [
            span.without_first_token().moved(index * width) for index, own in enumerate(prompt.spans) for span in own
        ]
        compressed = self.draft.compress(prompt.embeddings.flatten(0, 1), spans, self.runtime.absorbed)
        rows, places, visuals = [], [], []
        for index, length in enumerate(prompt.lengths.tolist()):
            embeddings = torch.cat([prompt.embeddings[index, 1:length], first[index : index + 1]])
            own, compressed = compressed[: len(prompt.spans[index])], compressed[len(prompt.spans[index]) :]
            row, place, visual = self.draft.prompt_rows(
                embeddings, prompt.features[index, :length], prompt.spans[index], own
            )
            rows.append(row)
            places.append(place)
            visuals.append(visual)
        counts = [len(row) for row in rows]
        lengths = torch.tensor(counts, device=first_tokens.device)
        hidden = pad_sequence(rows, batch_first=True)
        config = self.draft.config
        batch, longest, _ = hidden.shape
        self.cache = KeyValueCache.allocate(
            1, batch, config.key_value_heads, config.head_dim, longest + GROWTH_SLOTS, like=hidden
        )
        self.cache.begin(longest)
        output = self.draft(hidden, pad_sequence(places, batch_first=True), None, self.cache)
        self.cache.advance(lengths, counts)
        self._last = output[torch.arange(batch, device=hidden.device), lengths - 1]
        self._positions = prompt.lengths.clone()
        self._constant = self.runtime.constant(torch.stack(visuals))

    def settle(self, places: Places) -> None:
        """See `FixedSession.settle`."""
        self.cache = places.cache("cache", self.cache)
        self._last = places.tensor("last", self._last)
        self._positions = places.tensor("positions", self._positions)
        self._constant = places.tensor("constant", self._constant)

    def fix(self, tokens: int, tree: TreeConfig) -> None:
        """See `FixedSession.fix`; the compressed sequence is never longer than the uncompressed one."""
        self.cache.fix(tokens + max(tree.depth * tree.top_k, tree.longest_path))

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        """Runs the layer over the newly committed tokens; see `DraftSession.commit`."""
        batch, count = tokens.shape
        device = tokens.device
        hidden = self.runtime.rows(self.embedding(tokens), features, self._constant)
        self.cache.begin(count)
        positions = self._positions[:, None] + torch.arange(count, device=device)
        output = self.draft(hidden, positions, chain_words(batch, count, device), self.cache, self.runtime.layer)
        last = output[torch.arange(batch, device=device), (counts - 1).clamp(min=0)]
        self._last.copy_(torch.where((counts > 0)[:, None], last, self._last))
        self.cache.advance(counts, host_counts)
        self._positions += counts

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        """Grows the tree level by level; see `DraftSession.propose`. No loop runs over nodes."""
        head = self.runtime.head
        grower = TreeGrower(plan, head, root_tokens)
        hidden = self._last[:, None]
        frontier = grower.grow(head(hidden), grower.root(), hidden)
        while grower.deeper(frontier):
            hidden = self._level(grower.levels - 1, frontier.tokens, frontier.hidden, frontier.ancestors)
            frontier = grower.grow(head(hidden), frontier, hidden)
        return grower.build()

    def _level(self, level: int, tokens: Tensor, parents: Tensor, ancestors: Tensor) -> Tensor:
        """One pass over a frontier: K rows at one position, each seeing the prompt, its ancestors and itself.

        Levels lie one behind another in the slots after the committed ones. Returns [B, K, C].
        """
        top_k = tokens.shape[1]
        hidden = self.runtime.rows(self.embedding(tokens), parents, self._constant)
        self.cache.begin(top_k, offset=level * top_k)
        positions = (self._positions + level)[:, None].expand(-1, top_k)
        return self.draft(hidden, positions, ancestors, self.cache, self.runtime.layer)
