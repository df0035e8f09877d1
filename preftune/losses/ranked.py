"""Whole rankings: more than two responses to one prompt, best first."""

from __future__ import annotations

import torch

from preftune.losses.records import Ranked, ResponseLoss
from preftune.losses.terms import Beta


def plackett_luce(lists: Ranked, *, beta: Beta = 0.1) -> ResponseLoss:
    """K-wise DPO under the Plackett–Luce model (Rafailov et al., 2023, arXiv 2305.18290), equation 20.

    Per list −Σ_k log(exp r_k / Σ_{j>=k} exp r_j), r = β·log-ratio, responses in their order, best first. With two it is DPO.
    """
    reward = beta * lists.log_ratio
    n_responses, n_lists = reward.shape[0], lists.list_size.shape[0]
    of_list = torch.repeat_interleave(torch.arange(n_lists, device=reward.device), lists.list_size, output_size=n_responses)
    place = torch.arange(n_responses, device=reward.device)
    rivals = (of_list[:, None] == of_list[None, :]) & (place[None, :] >= place[:, None])  # [k, j]: j stays when k is picked
    against = reward[None, :] - reward[:, None]  # differences, so that a large common reward costs no digits
    surprise = against.masked_fill(~rivals, -torch.inf).logsumexp(1)
    return ResponseLoss(reward.new_zeros(n_lists).index_add(0, of_list, surprise), reward)
