"""How often what a draft proposes is accepted, against what it said itself."""

from __future__ import annotations

import torch
from torch import Tensor

# Cumulative log-probabilities that part the classes: about 0.95, 0.8, 0.6, 0.4, 0.2, 0.1, 0.03, 0.005.
EDGES = torch.tensor([-5.3, -3.5, -2.3, -1.6, -0.9, -0.5, -0.2, -0.05])
# A class begins with what the whole says of it, which counts as much as so many nodes; it remembers about so many of
# its own, and forgets with every round, so that a class that looked useless is tried again.
BELIEF, REMEMBERED, KEPT_A_ROUND = 8.0, 40.0, 0.99
# The whole begins with the draft's own word, which counts as much as so many accepted nodes.
TRUST = 2.0


class Acceptance:
    """Corrects a draft's scores by what was really accepted, class of scores by class of scores.

    A draft may be too sure of itself or too shy, and the target's temperature changes what is accepted; both show in
    the share of a class's nodes that lay on accepted paths.
    """

    def __init__(self) -> None:
        self._seen = torch.zeros(len(EDGES) + 1)
        self._accepted = torch.zeros(len(EDGES) + 1)
        self._stated = torch.zeros(len(EDGES) + 1)

    @property
    def honesty(self) -> float:
        """Accepted nodes over those that the draft's own word promised, all classes together."""
        return (float(self._accepted.sum()) + TRUST) / (float(self._stated.sum()) + TRUST)

    def __call__(self, scores: Tensor) -> Tensor:
        """Probability that the target's own text goes through each node.

        `scores` are cumulative natural-log probabilities of any shape, -inf for nodes that cannot be.
        """
        place = torch.bucketize(scores.contiguous(), EDGES)
        expected = (self.honesty * scores.exp()).clamp(max=1)
        return (self._accepted[place] + BELIEF * expected) / (self._seen[place] + BELIEF)

    def add(self, scores: Tensor, accepted: Tensor) -> None:
        """Learns from nodes that were verified: `scores` float32 and `accepted` bool of one shape."""
        place = torch.bucketize(scores.contiguous(), EDGES).flatten()
        counts = {"_seen": torch.ones(len(place)), "_accepted": accepted.float(), "_stated": scores.exp()}
        for name, values in counts.items():
            getattr(self, name).mul_(KEPT_A_ROUND).index_add_(0, place, values.flatten())
        kept = REMEMBERED / self._seen.clamp(min=REMEMBERED)
        for name in counts:
            getattr(self, name).mul_(kept)
