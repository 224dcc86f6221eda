"""The calibrated init of MLA, in closed form from second moments.

Everything is fitted to what the teacher feeds its scores and values - keys after QK-norm, before RoPE - as linear functions
of the layer's input, so nothing is asked of the source's structure. In complex numbers, one per RoPE pair f, a score is
sum_f Re(q_f conj(k_f) e^(i theta_f d)) at distance d. The steps:

1. Each pair j of the shared RoPE key has one of the teacher's own frequencies. All key heads of the source pairs that
   rotate most like it are reduced to one complex number, by PCA in the metric of the queries.
2. What that leaves of the keys gets no rotation: the factor e^(i theta_f d) becomes its mean over the distances that the
   teacher attends to, and goes into the queries.
3. Those remaining keys and the values share the latent: PCA of both, keys in the metric of the queries times the spread of
   the values, values in the metric of `o_proj`, which makes both an error of the attention's output. Tokens count by the
   attention they receive.
4. With a latent norm, one latent is kept near constant, so that the norm divides by nearly the same number everywhere; how
   large it should be depends on how near to a constant a linear function of the input can come. The up-projection is
   fitted to the normalised latent of a sample of inputs.
"""

from __future__ import annotations

import torch
from torch import nn

from pl_attnedit.attention.base import check_as_teachers, copy_linear, set_linear, solve
from pl_attnedit.attention.mla.module import MLA, MLAConfig
from pl_attnedit.attention.statistics import LayerStatistics
from pl_attnedit.errors import invalid
from pl_attnedit.teachers import AttentionSpec, output_projection

CONSTANT_SHARES = (10.0, 3.0, 1.0, 0.3)  # sizes to try of the constant latent over the norm of all the others
FIT_RIDGE = 1e-3  # keeps the fit to the sample near the up-projection that the moments give


def check_calibrated(config: MLAConfig, spec: AttentionSpec) -> None:
    """`UserError` for widths that the fit below cannot fill."""
    check_as_teachers(config, "calibrated", v_head_dim=spec.head_dim)
    for field in ("q_lora_rank", "kv_lora_rank") if config.latent_norm else ("q_lora_rank",):
        if getattr(config, field) == 1:
            raise invalid(field, 1, "must be at least 2: one latent is kept constant for the norm; or init 'random'")


@torch.no_grad()
def init_calibrated(mla: MLA, source: nn.Module, statistics: LayerStatistics) -> None:
    """Sets all weights of `mla` from the teacher's attention `source` and its statistics."""
    spec, target = mla.spec, mla.target
    width = spec.hidden_size + (1 if spec.qkv_bias else 0)  # without a bias the constant input is of no use
    plain, weighted = statistics.plain_xx[:width, :width], statistics.weighted_xx[:width, :width]
    query_map = solve(plain, statistics.xq[:width]).T.unflatten(0, (spec.num_heads, -1))  # (heads, head_dim, width)
    key_value = solve(weighted, statistics.weighted_xkv[:width]).T.unflatten(0, (2, spec.num_kv_heads, -1))
    key_map, value_map = key_value[0], key_value[1]  # (kv_heads, head_dim, width)
    groups = spec.num_heads // spec.num_kv_heads

    theta = statistics.frequencies  # (head_dim / 2,) radians per token
    static = mean_rotation(theta, statistics.distance)
    slots = mla.slot_frequencies(statistics.offered)
    drift = mean_rotation(theta[:, None] - slots[None, :], statistics.distance)  # (head_dim / 2, slots)
    slot_of = drift.abs().argmax(1)
    slot_of[drift.abs().amax(1) <= static.abs()] = -1  # no slot turns as this pair does: better without rotation

    query_complex = to_complex(query_map)  # (heads, half, width)
    key_complex = to_complex(key_map).transpose(0, 1)  # (half, kv_heads, width)
    rope_key, rope_query, remaining = rope_part(query_complex, key_complex, slot_of, drift, plain, weighted, groups)
    nope_query = from_complex(query_complex * static[:, None]) * statistics.rope_scale  # (heads, head_dim, width)
    nope_key = from_complex(remaining.transpose(0, 1))  # (kv_heads, head_dim, width)

    down, nope_up, value_up = latent_part(mla, source, statistics, nope_query, nope_key, value_map)
    nope_query, nope_up = fit_width(nope_query, nope_up, mla.nope_dim, plain, down @ weighted @ down.T)
    query = torch.cat([nope_query, rope_query], dim=1).flatten(0, 1)
    query = query * (spec.scaling / mla.scaling)  # the student's softmax divides by the root of another width
    if target.q_lora_rank is None:
        set_linear(mla.q_proj, query)
    else:
        plain_mean, (sample, weight) = statistics.plain_xx[:width, -1], statistics.sample
        even = torch.ones_like(weight)
        query_down, query_up = normed_low_rank(query, plain, plain_mean, target.q_lora_rank, sample[:, :width], even)
        set_linear(mla.q_a_proj, query_down)
        mla.q_a_layernorm.weight.fill_(1.0)
        mla.q_b_proj.weight.copy_(query_up)
    set_linear(mla.kv_a_proj_with_mqa, torch.cat([down, rope_key]))
    mla.kv_b_proj.weight.copy_(torch.cat([nope_up, value_up], dim=1).flatten(0, 1))
    if target.latent_norm:
        mla.get_parameter("kv_a_layernorm.weight").fill_(1.0)
    copy_linear(mla.o_proj, output_projection(source))


def rope_part(
    query: torch.Tensor,
    key: torch.Tensor,
    slot_of: torch.Tensor,
    drift: torch.Tensor,
    plain: torch.Tensor,
    weighted: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step 1. query (heads, half, width) and key (half, kv_heads, width), complex maps from the input.

    Returns the shared RoPE key (rope, width), each head's RoPE query (heads, rope, width), both in interleaved pairs, and
    what is left of the keys (half, kv_heads, width).
    """
    slots, width = drift.shape[1], key.shape[-1]
    shared = key.new_zeros(slots, width)
    rope_query = query.new_zeros(query.shape[0], slots, width)
    remaining = key.clone()
    for slot in range(slots):
        pairs = (slot_of == slot).nonzero().flatten()
        if not len(pairs):
            continue
        maps = key[pairs]  # (pairs, kv_heads, width)
        flat = maps.transpose(0, 1).flatten(0, 1)  # kv head major
        covariance = flat @ weighted.to(flat.dtype) @ flat.mH
        turned = query[:, pairs] * drift[pairs, slot].abs()[:, None]
        moments = turned @ plain.to(flat.dtype) @ turned.mH  # (heads, pairs, pairs)
        metric = torch.block_diag(*moments.unflatten(0, (-1, groups)).sum(1))
        root, inverse_root = matrix_roots(metric)
        direction = torch.linalg.eigh(root @ covariance @ root)[1][:, -1]
        spread, gather = inverse_root @ direction, direction.conj() @ root  # key ~ spread * (gather . key)
        shared[slot] = gather @ flat
        spread_by_head = spread.unflatten(0, (-1, len(pairs)))  # (kv_heads, pairs)
        remaining[pairs] -= torch.einsum("gp,w->pgw", spread_by_head, shared[slot])
        weights = spread_by_head.conj().repeat_interleave(groups, dim=0) * drift[pairs, slot]
        rope_query[:, slot] = torch.einsum("hp,hpw->hw", weights, query[:, pairs])

    def interleave(maps: torch.Tensor) -> torch.Tensor:
        return torch.stack([maps.real, maps.imag], dim=-2).flatten(-3, -2)

    return interleave(shared), interleave(rope_query), remaining


def latent_part(
    mla: MLA,
    source: nn.Module,
    statistics: LayerStatistics,
    nope_query: torch.Tensor,
    nope_key: torch.Tensor,
    value_map: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 3 and 4: the latent of what is left of the keys, and of the values.

    nope_query (heads, head_dim, width), nope_key and value_map (kv_heads, head_dim, width): maps from the input. Returns the
    down-projection (rank, width) and the up-projections of keys and values (heads, head_dim, rank).
    """
    spec, target, width = mla.spec, mla.target, nope_query.shape[-1]
    plain, weighted = statistics.plain_xx[:width, :width], statistics.weighted_xx[:width, :width]
    groups = spec.num_heads // spec.num_kv_heads
    mean, total = statistics.weighted_xx[:width, -1], statistics.weighted_xx[-1, -1]
    centred = weighted - torch.outer(mean, mean) / total
    metric = output_metric(
        output_projection(source).weight.to(plain.device).double(), nope_query, value_map, plain, centred, spec.scaling
    )
    root, inverse_root = matrix_roots(metric.flatten(0, 1))
    stacked = torch.cat([nope_key, value_map])  # (2 * kv_heads, head_dim, width)
    sample, weight = statistics.sample
    sample = sample[:, :width]
    maps = (root @ stacked).flatten(0, 1)
    if target.latent_norm:
        down, up = normed_low_rank(maps, weighted, mean, mla.rank, sample, weight)
    else:
        down, up = low_rank(maps, weighted, mla.rank)
    up = inverse_root @ up.unflatten(0, (2 * spec.num_kv_heads, -1))  # (2 * kv_heads, head_dim, rank)
    nope_up, value_up = up.unflatten(0, (2, -1)).repeat_interleave(groups, dim=1)
    return down, nope_up, value_up


def output_metric(
    o_weight: torch.Tensor,
    query: torch.Tensor,
    value: torch.Tensor,
    plain: torch.Tensor,
    centred: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Step 3: (2, kv_heads, head_dim, head_dim), squared output error per squared error of the keys, then of the values.

    query (heads, head_dim, width) and value (kv_heads, head_dim, width) are maps from the input; `plain` is its second
    moment for queries, `centred` its covariance for values.
    """
    kv_heads, heads = value.shape[0], query.shape[0]
    output = o_weight.unflatten(1, (heads, -1)).permute(1, 0, 2)  # (heads, hidden, head_dim)
    gram = output.transpose(1, 2) @ output
    covariance = (value @ centred @ value.transpose(1, 2)).repeat_interleave(heads // kv_heads, dim=0)
    spread = (gram * covariance).sum((1, 2))  # (heads,), variance of a value behind o_proj
    keys = scaling**2 * spread[:, None, None] * (query @ plain @ query.transpose(1, 2))
    return torch.stack([keys, gram]).unflatten(1, (kv_heads, -1)).sum(2)


def low_rank(maps: torch.Tensor, moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 3: `down` (rank, width) and `up` (outputs, rank) so that up @ down @ x is closest to maps @ x.

    maps (outputs, width); moment (width, width) of x.
    """
    vectors = torch.linalg.eigh(maps @ moment @ maps.T)[1].flip(-1)[:, :rank]
    missing = rank - vectors.shape[1]  # more latents than there is to store: the rest stays empty
    down = nn.functional.pad(vectors.T @ maps, (0, 0, 0, max(missing, 0)))
    return down, nn.functional.pad(vectors, (0, max(missing, 0)))


def normed_low_rank(
    maps: torch.Tensor, moment: torch.Tensor, mean: torch.Tensor, rank: int, sample: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 4: as `low_rank`, but up @ norm(down @ x), an RMSNorm of weight 1.

    mean (width,) of x; sample (samples, width) of x with a weight (samples,) each.
    """
    free_down, free_up = low_rank(maps, moment, rank - 1)
    energy = torch.einsum("rw,wv,rv->", free_down, moment, free_down)
    constant = solve(moment, mean[:, None]).T  # constant @ x is as near to 1 as a linear function can be
    wanted, root_weight = sample @ maps.T, weight.sqrt()[:, None]
    fits = []
    for share in CONSTANT_SHARES:
        down = torch.cat([constant * share * energy.sqrt(), free_down])
        up = torch.cat([free_up.new_zeros(len(free_up), 1), free_up], dim=1) * ((share**2 + 1) * energy / rank).sqrt()
        latent = nn.functional.rms_norm(sample @ down.T, (rank,), eps=1e-6) * root_weight
        missed = wanted * root_weight - latent @ up.T
        up = up + solve(latent.T @ latent, latent.T @ missed, FIT_RIDGE).T
        error = (wanted * root_weight - latent @ up.T).square().sum().item()
        fits.append((error, down, up))
    _, down, up = min(fits, key=lambda fit: fit[0])
    return down, up


def fit_width(
    query: torch.Tensor, key: torch.Tensor, width: int, query_moment: torch.Tensor, key_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of query and key heads (heads, head_dim, inputs) to heads of another width with the closest scores."""
    head_dim = query.shape[1]
    if width >= head_dim:
        pad = (0, 0, 0, width - head_dim)
        return nn.functional.pad(query, pad), nn.functional.pad(key, pad)
    query_root, query_inverse = matrix_roots(query @ query_moment @ query.transpose(1, 2))
    key_root, key_inverse = matrix_roots(key @ key_moment @ key.transpose(1, 2))
    left, singular, right = torch.linalg.svd(query_root @ key_root)
    share = singular[:, :width, None].sqrt()
    return (
        share * (left[..., :width].transpose(1, 2) @ query_inverse @ query),
        share * (right[:, :width] @ key_inverse @ key),
    )


def matrix_roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root and inverse square root of (..., n, n) Hermitian positive matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-9 * values.amax(-1, keepdim=True).clamp(min=1e-30)).sqrt()[..., None, :]
    return (vectors * values) @ vectors.mH, (vectors / values) @ vectors.mH


def mean_rotation(frequency: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Mean of e^(i frequency d) over distances d with weights `distance`; radians per token in any shape."""
    steps = torch.arange(len(distance), dtype=torch.float64, device=distance.device)
    return torch.polar(distance.expand(*frequency.shape, -1), frequency[..., None] * steps).sum(-1)


def to_complex(maps: torch.Tensor) -> torch.Tensor:
    """(heads, head_dim, width), entries that turn with each other in halves, as (heads, head_dim / 2, width), complex."""
    real, imaginary = maps.chunk(2, dim=1)
    return torch.complex(real, imaginary)


def from_complex(maps: torch.Tensor) -> torch.Tensor:
    """The reverse of `to_complex`."""
    return torch.cat([maps.real, maps.imag], dim=1)
