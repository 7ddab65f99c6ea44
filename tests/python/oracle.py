"""What heed.attention must return: a plain PyTorch composition in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
    chunk: int = 0,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    start_q: Tensor | None = None,
    start_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    intervals: Tensor | None = None,
    key_bits: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of heed.attention's arguments, both float64."""
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch = q.shape[0] if q.dim() == 4 else cu_seqlens_q.numel() - 1
    heads = q.shape[-2]
    group = heads // k.shape[-2]
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=torch.float64)
    lse_shape = (heads, q.shape[0]) if q.dim() == 3 else (batch, heads, q.shape[1])
    lse = torch.full(lse_shape, -torch.inf, dtype=torch.float64)

    for entry in range(batch):
        q_of, q_first, len_q = _entry(q, entry, cu_seqlens_q, start_q, seqused_q)
        if page_table is None:
            k_of, k_first, len_k = _entry(k, entry, cu_seqlens_k, start_k, seqused_k)
            v_of = _entry(v, entry, cu_seqlens_k, start_k, seqused_k)[0]
        else:
            pages = page_table[entry].long()
            k_of, v_of = (t[pages].flatten(0, 1) for t in (k, v))
            k_first, len_k = 0, int(seqused_k[entry])
        q_rows = q_of[q_first : q_first + len_q].double()
        k_rows, v_rows = (
            t[k_first : k_first + len_k].double().repeat_interleave(group, dim=1)
            for t in (k_of, v_of)
        )
        # A packed entry counts its slots from its first token, a padded one from the row's.
        q_slots = torch.arange(len_q) + (0 if q.dim() == 3 else q_first)
        k_slots = torch.arange(len_k) + (0 if k.dim() == 3 else k_first)

        score = float(np.float32(scale)) * torch.einsum("ihd,jhd->hij", q_rows, k_rows)
        if softcap:
            cap = float(np.float32(softcap))
            score = cap * torch.tanh(score / cap)
        position = torch.arange(len_q)[:, None] + len_k - len_q
        keys = torch.arange(len_k)[None]
        visible = torch.ones(len_q, len_k, dtype=torch.bool)
        if left is not None:
            visible &= keys >= position - left
        if right is not None:
            visible &= keys <= position + right
        if chunk:
            visible &= keys >= torch.div(position, chunk, rounding_mode="floor") * chunk
        if intervals is not None:
            rows = intervals if q.dim() == 3 else intervals[min(entry, intervals.shape[0] - 1)]
            rows = rows[q_first : q_first + len_q].long()
            visible &= (k_slots >= rows[:, :1]) & (k_slots < rows[:, 1:])
        if key_bits is not None:
            visible &= _bits(key_bits[min(entry, key_bits.shape[0] - 1)], k_slots)
        visible = visible.expand(heads, len_q, len_k)
        if bias is not None:
            full = bias.expand(batch, heads, *(max(1, n) for n in bias.shape[2:]))[entry]
            rows = q_slots if bias.shape[2] > 1 else torch.zeros_like(q_slots)
            of_entry = full[:, rows][:, :, k_slots]
            if bias.dtype == torch.bool:
                visible = visible & of_entry
            else:
                visible = visible & (of_entry != -torch.inf)
                score = score + of_entry.double().masked_fill(~visible, 0.0)
        score = score.masked_fill(~visible, -torch.inf)
        if sink is not None:
            logit = sink.double()[:, None, None].expand(heads, len_q, 1)
            score = torch.cat([score, logit], dim=-1)

        seen = torch.isfinite(score).any(-1)
        # A row that sees nothing is computed from zeros and thrown away: softmax of nothing is nan.
        safe = torch.where(seen[..., None], score, torch.zeros_like(score))
        p = torch.softmax(safe, dim=-1)[..., :len_k] * visible
        if dropout_p:
            p = p * keep(int(seed), entry, heads, len_q, len_k, dropout_p)
        sums = torch.logsumexp(safe, dim=-1) if score.shape[-1] else torch.zeros(heads, len_q)
        row_lse = torch.where(seen, sums, torch.full_like(sums, -torch.inf))
        row_out = torch.einsum("hij,jhd->ihd", p, v_rows)
        at = slice(q_first, q_first + len_q)
        if q.dim() == 3:
            out[at], lse[:, at] = row_out, row_lse
        else:
            out[entry, at], lse[entry, :, at] = row_out, row_lse
    return out, lse


def _entry(tensor: Tensor, entry: int, cu_seqlens, start, seqused) -> tuple[Tensor, int, int]:
    """The rows an entry's tokens are in, the first of them, and how many there are."""
    if cu_seqlens is not None:
        rows, first = tensor, int(cu_seqlens[entry])
        length = int(cu_seqlens[entry + 1]) - first
    else:
        rows, first = tensor[entry], 0 if start is None else int(start[entry])
        length = rows.shape[0] - first
    return rows, first, length if seqused is None else int(seqused[entry])


def _bits(words: Tensor, slots: Tensor) -> Tensor:
    """Slots past the last word are not valid."""
    index = slots // 32
    word = words.long()[index.clamp(max=words.numel() - 1)]
    return (index < words.numel()) & ((word >> (slots % 32)) & 1).bool()


def keep(seed: int, entry: int, heads: int, rows: int, columns: int, probability: float) -> Tensor:
    """What dropout multiplies P by: 0, or 1 / (1 - p). [heads, rows, columns]"""
    p = float(np.float32(probability))
    blocks = (columns + 3) // 4
    head, row, block = np.meshgrid(
        np.arange(heads), np.arange(rows), np.arange(blocks), indexing="ij"
    )
    words = np.stack(philox(seed, [row, block, head, np.full_like(row, entry)]), axis=-1)
    kept = words.reshape(heads, rows, 4 * blocks)[..., :columns] >= int(p * 2**32)
    return torch.from_numpy(kept / (1 - p))


def philox(key: int, counter: list[np.ndarray]) -> list[np.ndarray]:
    """Philox-4x32-10: four words of the key for every counter."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c = [np.asarray(x).astype(np.uint64) for x in counter]
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> half) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> half) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c
