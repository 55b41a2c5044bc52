"""Accuracy, perplexity, agreement and KL divergence on held-out conversations, and the table of them.

Everything is a sum over conversations or tokens until `rows`, so processes that measure parts of the data add
up to what one measures of all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..safety.distributed_means import processes
from ..token_groups import supervised

Rows = dict[str, dict[str, Any]]
TITLES = {
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "kl": "KL",
    "agreement": "agree",
    "mixer_error": "mixer err",
    "layer_error": "layer err",
}


class Scores:
    """What "teacher" and "student", or one of them, answer.

    Args:
        logit_loss: of a backend.
    """

    def __init__(self, logit_loss: Callable[..., Tensor]) -> None:
        self.logit_loss = logit_loss
        self.sums: dict[tuple[str, ...], float] = defaultdict(float)

    @torch.no_grad()
    def add(self, logits: dict[str, Tensor], labels: Tensor, kinds: Sequence[str]) -> None:
        """Add a batch.

        Args:
            logits: (B, n, V) by model, of the n positions that `supervised(labels)` gives.
            labels: (B, L) int64, -100 where not supervised.
            kinds: of the B conversations.
        """
        positions, mask = supervised(labels)
        choices = {model: values.argmax(-1) for model, values in logits.items()}
        for model, choice in choices.items():
            right = ((choice == labels[:, positions + 1]) | ~mask).all(1)
            asked = mask.any(1).tolist()  # one in which nothing is supervised says nothing
            for kind, is_right, counts in zip(kinds, right.tolist(), asked, strict=True):
                if counts:
                    self.sums["conversations", model, kind] += 1
                    self.sums["right", model, kind] += is_right
        tokens = int(mask.sum())
        self.sums["tokens",] += tokens
        for model, values in logits.items():
            self.sums["surprise", model] += surprise(values, labels[:, positions + 1])
        if len(logits) == 2:
            self.sums["kl",] += float(self.logit_loss(logits["student"], logits["teacher"], mask)) * tokens
            self.sums["agreement",] += float(((choices["student"] == choices["teacher"]) & mask).sum())

    def rows(self) -> Rows:
        """The measurements by model, over all processes.

        Returns:
            `accuracy` (share of conversations whose supervised tokens are all the most likely ones: what
            greedy decoding would answer), `kinds` (the same by kind), `perplexity` (exp of the mean negative
            log-likelihood of a supervised token), and where there are two models `kl`
            (nats per supervised token) and `agreement` (share of supervised tokens with the teacher's most
            likely one).
        """
        sums = add_up(self.sums)
        models = dict.fromkeys(key[1] for key in sums if key[0] == "right")
        rows: Rows = {}
        tokens = max(sums["tokens",], 1)
        for model in sorted(models, reverse=True):  # the teacher first
            kinds = sorted(key[2] for key in sums if key[:2] == ("right", model))
            right = {kind: sums["right", model, kind] for kind in kinds}
            count = {kind: sums["conversations", model, kind] for kind in kinds}
            accuracy = sum(right.values()) / sum(count.values())
            perplexity = exp(sums["surprise", model] / tokens)
            shares = {kind: right[kind] / count[kind] for kind in kinds}
            rows[model] = {"accuracy": accuracy, "perplexity": perplexity, "kinds": shares}
        if len(rows) == 2:
            rows["student"] |= {"kl": sums["kl",] / tokens, "agreement": sums["agreement",] / tokens}
            rows["teacher"] |= {"kl": 0.0, "agreement": 1.0}
        return rows


def surprise(logits: Tensor, labels: Tensor) -> float:
    """Sum of the negative log-likelihoods, in nats, of labels (B, n) given logits (B, n, V)."""
    rows = zip(logits, labels, strict=True)  # one by one: in float32, all may be more than there is room for
    losses = [cross_entropy(of_row.float(), label, reduction="sum") for of_row, label in rows]
    return float(torch.stack(losses).sum())


def shown(value: float) -> str:
    """A value of the table; an untrained student's perplexity may need more digits than there is room for."""
    return f"{value:11.3f}" if value < 1e6 else f"{value:11.1e}"


def exp(nats: float) -> float:
    """exp, infinite where it is too large for a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def add_up(sums: dict[tuple, float]) -> dict[tuple, float]:
    """Sums over all processes, in the order of their ranks."""
    if processes() == 1:
        return sums
    every: list[dict[tuple, float]] = [{} for _ in range(processes())]
    dist.all_gather_object(every, dict(sums))
    whole: dict[tuple, float] = defaultdict(float)
    for part in every:
        for key, value in part.items():
            whole[key] += value
    return whole


def table(rows: Rows, title: str = "held-out") -> str:
    """Measurements side by side."""
    row = next(reversed(rows.values()))
    measures = [measure for measure in TITLES if measure in row]
    lines = [f"{title:12}" + "".join(f"{name:>11}" for name in [*map(TITLES.get, measures), *row["kinds"]])]
    for name, row in rows.items():
        values = [*(row[measure] for measure in measures), *row["kinds"].values()]
        lines.append(
            f"{name:12}" + "".join(f"{value:11.3f}" if value < 1e6 else f"{value:11.1e}" for value in values)
        )
    return "\n".join(lines)
