"""What every result is measured against: dense attention with an explicit mask, in float64 for the
exact result and in the dtype of the call for the error that is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    key_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eager attention in the dtype of its inputs: ``(out, lse)``; rows that see nothing give 0 and
    -inf. Biases are made in float32 at least.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    if key_bias is not None:
        bias = key_bias.to(wide).repeat_interleave(q.shape[1] // key_bias.shape[1], 1)
        scores = (scores + bias[:, :, None]).to(q.dtype)
    if alibi_slopes is not None:
        scores = (scores - alibi_slopes.to(wide)[:, None, None] * distances(mask)).to(q.dtype)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1, total)
    probs = (weights / safe)[..., : k.shape[2]]
    lse = torch.where(empty, -torch.inf, peak + torch.log(safe)).squeeze(-1)
    return probs @ v, lse


def distances(mask: Tensor) -> Tensor:
    """``|p - j|`` for the rows and keys of a mask, the last row standing at the last key."""
    rows, keys = mask.shape[-2:]
    p = torch.arange(rows, device=mask.device)[:, None] + keys - rows
    return (p - torch.arange(keys, device=mask.device)).abs()


def rounding_noise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    dlse: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    key_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> dict[str, Tensor]:
    """What one rounding of lse to float32, and one of every dp and delta, can change in each
    gradient: the gradients' formulas with absolute values in place of differences.

    Eager attention never rounds a logarithm of its sums, and where a row sees one key it cancels
    dp and delta exactly; a kernel that gets ``(out, lse)`` can do neither.
    """
    q, k, v, dout, dlse = (x.detach().double() for x in (q, k, v, dout, dlse))
    group = q.shape[1] // k.shape[1]
    every_key = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
    probs, lse = dense_attention(
        q, k, every_key, mask, scale=scale, softcap=softcap, sink_logits=sink_logits,
        key_bias=key_bias, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    delta = (dout * (probs @ v)).abs().sum(-1) + dlse.abs()
    lse = torch.where(torch.isinf(lse), 0, lse)
    roundings = 2.0**-24 * (1 + lse.abs())
    probs = probs * roundings[..., None]
    dscores = probs * (dout.abs() @ v.abs().mT + delta[..., None])
    ds = dscores * (q.shape[-1] ** -0.5 if scale is None else abs(scale))
    dk, dv = ds.mT @ q.abs(), probs.mT @ dout.abs()
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    noise = {"dq": ds @ k.abs(), "dk": dk, "dv": dv}
    if sink_logits is not None:
        weight = torch.exp(sink_logits.double()[:, None] - lse) * roundings
        noise["dsink_logits"] = (weight * delta).sum((0, 2))
    if key_bias is not None:
        by_head = dscores.sum(2).unflatten(1, (key_bias.shape[1], -1)).sum(2)
        noise["dkey_bias"] = by_head.sum(0, keepdim=True) if len(key_bias) == 1 else by_head
    if alibi_slopes is not None:
        noise["dalibi_slopes"] = (dscores * distances(mask)).sum((0, 2, 3))
    return noise


def assert_accurate(
    ours: Tensor, exact: Tensor, eager: Tensor, name: str = "out", noise: Tensor | None = None
) -> None:
    """Error at most twice that of eager attention in the same dtype, in the maximum and in the
    mean.

    Two units in the last place of the largest value are granted on top, because eager can be exact
    by chance (64 in float64, where eager is the exact result itself), and the `noise` that the
    interface of gradients implies, see `rounding_noise`.
    """
    assert ours.dtype == eager.dtype, (name, ours.dtype, eager.dtype)
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    ulps = (64 if ours.dtype == torch.float64 else 2) * torch.finfo(ours.dtype).eps
    infinite = torch.isinf(exact)
    assert torch.equal(torch.isinf(ours), infinite), f"{name}: infinities differ"
    if ours.numel() == 0:
        return
    ours, exact, eager = (torch.where(infinite, 0, x.double()) for x in (ours, exact, eager))
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error, allowed = (ours - exact).abs(), (eager - exact).abs()
    slack = ulps * exact.abs().max()
    noise = torch.zeros(1) if noise is None else noise
    limit = 2 * allowed.max() + slack + noise.max()
    assert error.max() <= limit, f"{name}: max error {error.max():.3g} > {limit:.3g}"
    limit = 2 * allowed.mean() + slack / 4 + noise.mean()
    assert error.mean() <= limit, f"{name}: mean error {error.mean():.3g} > {limit:.3g}"
