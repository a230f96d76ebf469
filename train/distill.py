"""Distillation from the uncompressed model: its distribution over answer tokens is the target of the compressed one.

Hinton et al. 2015 ("Distilling the knowledge in a neural network"), section 2, over the `top_k` most likely tokens and one more outcome
for all others together: cut to `top_k` and normalised again, the target would be a distribution that the teacher never gave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Teacher:
    """Of ``T`` predicted tokens, in the order of the batch: the most likely words ``(T, k)`` and their log-probabilities ``(T, k)``
    at `temperature`. What they leave to 1 is the probability of all other words. `weight`: its share in the loss; cross-entropy has
    the rest."""

    words: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    weight: float = 1.0

    def __getitem__(self, part: slice) -> Teacher:
        return replace(self, words=self.words[part], log_probs=self.log_probs[part])

    def to(self, device: torch.device) -> Teacher:
        return replace(self, words=self.words.to(device), log_probs=self.log_probs.to(device))


def most_likely(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits ``(T, V)`` → the `top_k` likeliest words and their log-probabilities at `temperature`, both ``(T, k)``, k ≤ V − 1."""
    scaled = logits.float() / temperature
    best = scaled.topk(min(top_k, logits.shape[-1] - 1), dim=1)
    return best.indices, best.values - scaled.logsumexp(dim=1, keepdim=True)


def divergence_(logits: Tensor, teacher: Teacher) -> Tensor:
    """Temperature² times the summed Kullback–Leibler divergence of the teacher from ``(T, V)`` logits, which are overwritten with
    its gradient. Float32 inside whatever their type.

    The factor keeps the gradient's size when the temperature changes (Hinton et al., section 2).
    """
    heat = teacher.temperature
    scaled = logits.float() / heat
    words, target = teacher.words.long(), teacher.log_probs.float()
    share = target.exp()  # (T, k)
    rest = (1.0 - share.sum(dim=1, keepdim=True)).clamp(min=0.0)  # (T, 1)

    total = scaled.logsumexp(dim=1, keepdim=True)
    chosen = scaled.gather(1, words)
    others = scaled.scatter_(1, words, -torch.inf)  # all other words; nothing else is needed of `scaled`
    total_of_others = others.logsumexp(dim=1, keepdim=True)

    own = chosen - total  # log-probabilities of the student
    loss = (share * (target - own)).sum()
    loss = loss + torch.where(rest > 0, rest * (rest.clamp(min=1e-30).log() - (total_of_others - total)), 0.0).sum()

    # d/dz of −Σ p_k log q_k − p_rest log q_rest, q's words in `others` sharing q_rest as their softmax does
    among_others = (others - total_of_others).exp()
    gradient = among_others * ((total_of_others - total).exp() - rest)
    gradient.scatter_(1, words, own.exp() - share)
    logits.copy_(gradient * heat)
    return loss * heat**2
