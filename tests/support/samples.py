"""Arguments of every operator."""

from __future__ import annotations

import torch

from mmfuse import NoiseStream


def samples(device: str) -> dict[str, list[tuple]]:
    """Arguments of every overload: usual, empty, and with every optional part present."""
    g = [torch.randn(5, 3, device=device), torch.randn(0, device=device), torch.randn(9).to(device)]
    w, w0 = [torch.randn_like(t) for t in g], [torch.randn_like(t) for t in g]
    three = torch.rand(3, device=device)
    flag = torch.ones((), dtype=torch.bool, device=device)
    state = NoiseStream(3, device).state
    logits = [torch.randn(4, c, device=device) for c in (3, 5)]
    tracked = [z.clone().requires_grad_() for z in logits]
    labels = torch.tensor([0, 1, -100, 2], device=device)
    two = torch.rand(2, device=device)
    index = torch.tensor([1, 0, 1], device=device)
    k = torch.tensor(0.5, device=device)
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    divisor = k.clone().requires_grad_()
    mixed = [a.half(), b.double(), k.expand(4), a[:, :0]]
    keep = torch.tensor([[True, False, True, True]] * 4, device=device)
    no_rows = [t[:0] for t in mixed]
    ends = torch.tensor([[-9.0, 9.0]], device=device).repeat(4, 1)
    end_leaves = [ends.clone().requires_grad_() for _ in range(2)]
    sums = torch.randn(2, 4, device=device).unbind()
    return {
        "modality_scores": [(logits, labels), (tracked, labels)],
        "modality_scores_backward": [(two, two.flip(0), logits, labels)],
        "discrepancy_ratios": [(two,)],
        "modulation_factors": [
            (two, index, None, None, 0.8, False, 0.0),
            (two.double(), index, index + 1, three, 0.8, True, 1e-8),
            (two, index[:0], index[:0], three[:0].double(), 0.0, False, 1e-8),
        ],
        "grad_stats": [(g, [], []), (g, w, w0), (g, w, []), ([t.double() for t in g], [], [])],
        "noisy_views": [
            (a, 0.1, state, [0, 1], [0, 0]),
            (leaves[0], 0.1, state, [7, 2], [5, 2**31 + 1]),
            (a.half(), 0.0, state, [0, 1], [0, 0]),
        ],
        "drop_modalities": [
            ([a, b], two, state, [0, 1], [0, 0], None),
            (leaves, two, state, [7, 2], [5, 2**31 + 1], k),
            (mixed, two.repeat(2), state, [0, 1, 2, 3], [0] * 4, k.double()),
            (no_rows, two.repeat(2), state, [0, 1, 2, 3], [1] * 4, None),
        ],
        "drop_modalities_backward": [
            ([a, b], keep[:2], None),
            (mixed, keep, k.double()),
            (no_rows, keep[:, :0], k),
        ],
        "joint_entropies": [
            ([a, b], [0, 1], 2, 5),
            ([a, b, a], [2, 1, 0, 2], 2, 1),
            ([a.half(), b.half(), a.half()], [0, 1, 2, 2, 2, 0], 3, 4),
        ],
        "soft_histogram": [
            (a, b, ends, ends, 5),
            (*leaves, *end_leaves, 2),
            (a.half(), b.half(), ends, ends, 7),
        ],
        "soft_histogram_backward": [
            (torch.randn(4, 5, 5, device=device), a, b, ends, ends, 5),
            (torch.randn(4, 2, 2, device=device), a.bfloat16(), b.bfloat16(), ends, ends, 2),
        ],
        "info_nce": [
            (a, b, k),
            (*leaves, divisor),
            (a.half(), b.half(), k),
            (a[:, :0], b[:, :0], k),
        ],
        "info_nce_backward": [
            (k, a, b, k, *sums),
            (k, a.half(), b.half(), k, *sums),
            (k, a[:, :0], b[:, :0], k, *sums),
        ],
        "redundancy_ratio": [(a, b, k), (*leaves, divisor), (a.half(), b.half(), k)],
        "paired_cosine": [(a, b), (*leaves,), (a[:, :0], b[:, :0])],
        "paired_cosine_backward": [(k, a, b), (k, a[:0], b[:0]), (k, a[:, :0], b[:, :0])],
        "co_information_gate": [([a, b], k), ([a, b, a], -k), ([a[:0], b[:0]], k)],
        "update_grads_": [
            (g, three, [], [], None, None, None, [], [], None, None),
            (g, three, w, w0, three, three, state, [0, 1, 2], [0, 0, 5], flag, None),
            (g, three, w, [], three, three, state, [0, 1, 2], [0, 0, 5], flag, None),
            (g, three, w, w0, three, None, None, [], [], flag, torch.ones_like(three)),
            (g, three, [], [], None, three, state, [0, 1, 2], [0, 0, 5], None, three.double()),
        ],
        "scale_grad_backward": [
            (g[0], k, None, None, 0, 0),
            (g[0].clone().requires_grad_(), k, None, None, 0, 0),
            (g[0], k, k, state, 3, 1),
        ],
    }
