"""Predicts the velocity error of a plan from the errors of its replacements alone, and how they point.

To first order the errors that replacements cause in the velocity add up as vectors: `‖Σ eᵢ‖² = Σᵢ Σⱼ ⟨eᵢ, eⱼ⟩`. The
sum of the sensitivities, `Σᵢ ‖eᵢ‖²`, leaves the products of different replacements out. Those of neighbours are
positive, so plans of many replacements look better than they are. Here the products are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ppcl.replacements import Replacement

# A replacement costs at least this share of its own error, however much of it others undo: predictions of errors that
# cancel are the least reliable ones.
_LEAST = 0.1


class ErrorModel:
    """Predicts errors of plans; see above."""

    def __init__(self, replacements: Sequence[Replacement], products: np.ndarray):
        """`products` `(R, R)` float64: `⟨eᵢ, eⱼ⟩` over `‖v_T‖²`, in the order of `replacements`."""
        self.replacements, self.products = list(replacements), products
        self._rows = {replacement: row for row, replacement in enumerate(self.replacements)}

    @classmethod
    def additive(cls, sensitivity: Mapping[Replacement, float]) -> ErrorModel:
        """A model in which errors have nothing to do with each other."""
        return cls(list(sensitivity), np.diag(list(sensitivity.values())))

    def of(self, replacements: Sequence[Replacement]) -> ErrorModel:
        """The same of some replacements alone."""
        rows = self._numbers(replacements)
        return ErrorModel(replacements, self.products[np.ix_(rows, rows)])

    @property
    def sensitivity(self) -> dict[Replacement, float]:
        """Each replacement's error alone."""
        return dict(zip(self.replacements, self.products.diagonal().tolist(), strict=True))

    def __call__(self, plan: Iterable[Replacement]) -> float:
        """The predicted relative squared velocity error of a plan."""
        rows = self._numbers(plan)
        return max(0.0, float(self.products[np.ix_(rows, rows)].sum()))

    def costs_around(self, plan: Iterable[Replacement]) -> dict[Replacement, float]:
        """What each replacement adds to a plan's error, as costs that can be summed.

        Its own error and its products with those that are on: over the plan itself they sum up to its error.
        """
        on, own = self._numbers(plan), self.products.diagonal()
        others = self.products[:, on].sum(1)
        others[on] -= own[on]
        costs = np.maximum(own + others, _LEAST * own)
        return dict(zip(self.replacements, costs.tolist(), strict=True))

    def corrected(
        self, costs: Mapping[Replacement, float], plan: Iterable[Replacement], share: float
    ) -> dict[Replacement, float]:
        """Costs moved by a share of the way to those around a plan: all of it makes a search swing between two."""
        around = self.costs_around(plan)
        return {replacement: cost + share * (around[replacement] - cost) for replacement, cost in costs.items()}

    def _numbers(self, plan: Iterable[Replacement]) -> list[int]:
        return [self._rows[replacement] for replacement in plan]
