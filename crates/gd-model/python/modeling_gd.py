"""A selection-attention model in plain PyTorch, with the same results as the Rust implementation.

Inference only, with a cache, O(N M) for N new positions and M positions in all. Batches are padded on the left. Shapes:
hidden states [B, N, C], queries [B, H, N, D], keys and values [B, Hk, M, D], or [B, H, M, D] after they are repeated for each
query head. The new positions are the last N of the M.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_gd import GdConfig

INF = float("inf")


class GdCache:
    """What the layers remember of the positions so far, by name: keys, values and priors, the last inputs of the causal
    convolution, and the state of the running averages. Every tensor has the batch as its first dimension."""

    is_compileable = False

    def __init__(self):
        self.layers = []
        self.length = 0

    def layer(self, index):
        """The tensors of a layer, a dictionary that the layer changes."""
        while len(self.layers) <= index:
            self.layers.append({})
        return self.layers[index]

    def get_seq_length(self, layer_idx=0):
        return self.length

    def _each(self, change):
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = change(tensor)

    def reorder_cache(self, beam_idx):
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices):
        self._each(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats):
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))


class Context:
    """The positions of one forward pass: `positions` [B, N] of the new ones in their sequences, `visible` [B, M] for which
    positions hold a token, and the rotary frequencies."""

    def __init__(self, visible, n, frequencies):
        self.visible, self.n, self.frequencies = visible, n, frequencies
        self.positions = (visible.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]

    def keys(self, window):
        """Whether key j is visible to query i, at most `window` positions back: [B, 1, N, M]."""
        m = self.visible.shape[1]
        i = torch.arange(m - self.n, m, device=self.visible.device)[:, None]
        j = torch.arange(m, device=self.visible.device)[None, :]
        return ((j <= i) & (j > i - (window or m)))[None, None] & self.visible[:, None, None, :]


def append(cache, name, tensor, dim):
    """The tensor of this name in the cache of a layer, with the new one behind it along `dim`."""
    if cache is None:
        return tensor
    if name in cache:
        tensor = torch.cat([cache[name], tensor], dim)
    cache[name] = tensor
    return tensor


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def frequencies(config):
    """The rotary frequencies [D / 2] in radians per position, with the scaling of the config."""
    rope, half = config.rope_parameters, config.head_dim // 2
    f = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        f = f / rope["factor"]
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * f / math.tau
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        f = (1 - unscaled) * f / rope["factor"] + unscaled * f
    return f


def rotate(x, context):
    """Rotates the pairs (i, i + D/2) of each row of [B, H, N, D] by its position times the frequencies."""
    angles = context.positions[:, None, :, None].double() * context.frequencies.to(x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Weights(nn.Module):
    """Parameters with the given names and shapes."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Beacon(nn.Module):
    """Causal convolution of the hidden states, running averages of the values, and key prior."""

    def __init__(self, config, beacon, priors):
        super().__init__()
        c, self.heads, self.averages = config.hidden_size, config.num_attention_heads, beacon["averages"]
        rows = self.heads * self.averages
        self.conv = Weights(weight=(c, beacon["conv_width"])) if beacon["conv_width"] > 1 else None
        self.memory = nn.Linear(c, 3 * rows) if rows else None
        self.prior = nn.Linear(c, priors, bias=False) if beacon["prior"] and priors else None

    def mix(self, x, context, cache):
        """Adds the causal convolution of the hidden states, if there is one. Before the first token they are zero."""
        if self.conv is None:
            return x
        taps = self.conv.weight
        past = taps.shape[1] - 1
        x = torch.where(context.visible[:, -context.n :, None], x, 0)
        before = cache.get("conv") if cache is not None else None
        padded = F.pad(x, (0, 0, past, 0)) if before is None else torch.cat([before, x], 1)
        if cache is not None:
            cache["conv"] = padded[:, -past:]
        windows = padded.unfold(1, taps.shape[1], 1)  # [B, N, C, W], oldest position first
        return x + (windows * taps).sum(-1)

    def decay_offsets(self, x):
        """Offsets [H R] of the decay logits: linear in the head, in reverse order for every second average."""
        logits = torch.linspace(-1.0, 3.5, max(self.heads, 2), dtype=x.dtype, device=x.device)[: self.heads]
        both = [logits if r % 2 == 0 else logits.flip(0) for r in range(self.averages)]
        return torch.stack(both, 1).flatten()

    def running_averages(self, x, v, context, cache):
        """The gated running averages of the values, summed over the averages of each head: [B, H, N, D]."""
        (b, n, _), h, r = x.shape, self.heads, self.averages
        decay, write, gate = self.memory(x).view(b, n, 3, h * r).permute(2, 0, 3, 1)  # each [B, H R, N]
        write = write.double().masked_fill(~context.visible[:, None, -n:], -INF)
        log_keep = F.logsigmoid(decay + self.decay_offsets(x)[:, None])
        # The logarithm of the weight of position s at position t is write_s + sum of log_keep over s < u <= t.
        total = log_keep.double().cumsum(-1)
        logs = write[:, :, None, :] + total[..., :, None] - total[..., None, :]
        logs = logs.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), -INF)
        v = v.repeat_interleave(h * r // v.shape[1], 1)
        if cache is not None and "mean" in cache:
            # The positions before count as one, with their average and their weight.
            logs = torch.cat([(cache["log_weight"][..., None] + total)[..., None], logs], -1)
            v = torch.cat([cache["mean"][:, :, None], v], 2)
        # A row without a token has no weight.
        mean = logs.softmax(-1).nan_to_num().to(v.dtype) @ v
        if cache is not None:
            cache["mean"], cache["log_weight"] = mean[:, :, -1], logs[:, :, -1].logsumexp(-1)
        return (mean * gate.sigmoid()[..., None]).view(b, h, r, n, -1).sum(2)


def coherence(t, alpha, mode):
    """u* and 1 - u* for t = beta |k - q|^2 and the weight alpha of the query's well, by bisection."""
    swapped = alpha < 0.5
    heavy = torch.where(swapped, 1 - alpha, alpha).double().expand_as(t)
    t, offset = t.double(), ((1 - heavy) / heavy).log()
    lo, hi = torch.zeros_like(t), torch.full_like(t, 0.5 if mode == "global" else 1.0)
    for _ in range(60):
        middle = (lo + hi) / 2
        defect = middle - torch.sigmoid(offset + t * (2 * middle - 1))
        if mode == "global":
            lo, hi = torch.where(defect < 0, middle, lo), torch.where(defect < 0, hi, middle)
        else:
            lo, hi = torch.where(defect <= 0, middle, lo), torch.where(defect >= 0, middle, hi)
    swapped = swapped.expand_as(t)
    return torch.where(swapped, 1 - hi, hi), torch.where(swapped, hi, 1 - hi)


def density(t, alpha, mode):
    """The density exp(-E*) of the mixture at the coherence point."""
    u, rest = coherence(t, alpha, mode)
    t, alpha = t.double(), alpha.double()
    return alpha * (-t * u * u).exp() + (1 - alpha) * (-t * rest * rest).exp()


def barrier(score, members, protected, rule):
    """Raises the score of the protected candidate with the highest score where the barrier is active.

    `score` [B, H, N, M]; `members` marks the candidates and `protected` those that are protected.
    """
    positions = torch.arange(score.shape[-1], device=score.device)
    first = protected & (score == score.masked_fill(~protected, -INF).amax(-1, keepdim=True))
    own = positions == torch.where(first, positions, positions.numel()).amin(-1, keepdim=True)
    mine = torch.where(own, score, -INF).amax(-1, keepdim=True)
    others = score.masked_fill(own | ~members, -INF)
    gap = others.amax(-1, keepdim=True) - mine
    weights = score.softmax(-1).nan_to_num()
    count = members.sum(-1, keepdim=True)
    entropy = torch.special.entr(weights).sum(-1, keepdim=True) / count.clamp(min=2).log()
    weight = (weights * own).sum(-1, keepdim=True)
    low_weight = (weight < rule["floor"]) & (gap <= rule["margin"] + rule["slack"])
    contested = (gap <= rule["margin"]) & (entropy >= rule["entropy_trigger"])
    active = (low_weight | contested) & (count > 1) & protected.any(-1, keepdim=True)
    raised = mine + rule["strength"] * (rule["margin"] - gap).clamp(min=0)
    rest = others.logsumexp(-1, keepdim=True)
    floor = math.log(rule["floor"] / (1 - rule["floor"])) + rest
    raised = torch.where(torch.sigmoid(raised - rest) < rule["floor"], floor, raised)
    return torch.where(own & active, raised, score)


class Gd(nn.Module):
    """Per-head parameters of a selecting layer: log beta and, if configured, threshold, its slope in the logarithm of the
    number of visible keys, alpha logit and rounds."""

    def __init__(self, heads, select):
        super().__init__()
        shapes = {"beta": heads}
        if select.get("threshold") is not None:
            shapes["threshold"] = heads
        if select.get("threshold_by_length"):
            shapes["threshold_slope"] = heads
        if select["gate"] == "coherence":
            shapes["alpha"] = heads
        if select["rounds"] > 1:
            shapes["rounds"] = (heads, select["rounds"])
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Attention(nn.Module):
    """Softmax or selection attention, depending on the mechanism of the layer."""

    def __init__(self, config, layer):
        super().__init__()
        c, d, gd = config.hidden_size, config.head_dim, config.gd
        self.heads, self.kv_heads, self.d = config.num_attention_heads, config.num_key_value_heads, d
        q, kv, bias = self.heads * d, self.kv_heads * d, config.attention_bias
        # The heads that read keys, the first ones; the others are running averages alone.
        selecting = gd.get("selecting_heads") or [self.heads]
        self.reading = selecting[min(layer, len(selecting) - 1)]
        # Those that match content without positions, the first ones.
        induction = gd.get("induction_heads") or [0]
        self.induction = induction[min(layer, len(induction) - 1)]
        self.group = self.heads // self.kv_heads
        keys = self.reading // self.group
        self.q_proj = nn.Linear(c, self.reading * d, bias=bias) if keys else None
        self.k_proj = nn.Linear(c, keys * d, bias=bias) if keys else None
        self.v_proj, self.o_proj = nn.Linear(c, kv, bias=bias), nn.Linear(q, c, bias=gd.get("output_bias", False))
        self.g_proj = nn.Linear(c, q, bias=False) if gd.get("output_gate") else None
        self.q_norm = RmsNorm(d, config.rms_norm_eps) if gd.get("qk_norm") and keys else None
        self.k_norm = RmsNorm(d, config.rms_norm_eps) if gd.get("qk_norm") and keys else None
        beacon = gd.get("beacon")
        if beacon is not None:
            beacon = {"conv_width": 4, "averages": 2, "prior": True, "protected": 0, "barrier": None, **beacon}
        self.protected = beacon["protected"] if beacon else 0
        self.rule = beacon["barrier"] if beacon else None
        self.beacon = Beacon(config, beacon, keys) if beacon else None
        self.select = {
            "candidates": 8, "score": "energy", "norm_prior": False, "tie": "first", "gate": "none",
            "estimator": "candidates", "temperature": 1.0, "rounds": 1, "coherence": "global",
            "exclude_below": 0.5, "picks": 1,
            **(gd.get("select") or {}),
        }
        mechanisms, windows = gd["mechanism"], gd.get("windows") or [None]
        selects = keys and mechanisms[layer % len(mechanisms)] == "gd"
        self.gd = Gd(self.reading, self.select) if selects else None
        self.window = windows[layer % len(windows)]

    def forward(self, x, context, cache):
        b, n, _ = x.shape
        x = self.beacon.mix(x, context, cache) if self.beacon else x
        v = self.v_proj(x).view(b, n, -1, self.d).transpose(1, 2)
        has_memory = self.beacon and self.beacon.memory
        memory = self.beacon.running_averages(x, v, context, cache) if has_memory else None
        y = self.read(x, v, context, cache) if self.q_proj else memory[:, :0]
        if self.reading < self.heads:
            y = torch.cat([y, torch.zeros_like(memory[:, self.reading :])], 1)
        y = y if memory is None else y + memory
        y = y.transpose(1, 2).reshape(b, n, -1)
        if self.g_proj:
            y = y * self.g_proj(x).sigmoid()
        return self.o_proj(y)

    def to_heads(self, x, projection, norm):
        """The heads [B, H, N, D] of a projection, normalised if there is a norm."""
        heads = projection(x).view(*x.shape[:2], -1, self.d)
        return (norm(heads) if norm else heads).transpose(1, 2)

    def preceding(self, x, context, cache):
        """The row before each row of x [B, N, C]; zeros before the first token."""
        x = torch.where(context.visible[:, -context.n :, None], x, 0)
        first = cache.get("last_input") if cache is not None else None
        first = torch.zeros_like(x[:, :1]) if first is None else first
        if cache is not None:
            cache["last_input"] = x[:, -1:]
        return torch.cat([first, x[:, :-1]], 1)

    def read(self, x, v, context, cache):
        """What the heads that read keys read: [B, H, N, D]."""
        q, k = self.to_heads(x, self.q_proj, self.q_norm), self.to_heads(x, self.k_proj, self.k_norm)
        q_by_content, q, k = q[:, : self.induction], rotate(q, context), rotate(k, context)
        if self.induction:
            # The key at a position is that of the position before it.
            before = self.to_heads(self.preceding(x, context, cache), self.k_proj, self.k_norm)
            heads = self.induction // self.group
            q = torch.cat([q_by_content, q[:, self.induction :]], 1)
            k = torch.cat([before[:, :heads], k[:, heads:]], 1)
        k, v = append(cache, "k", k, 2), append(cache, "v", v[:, : k.shape[1]], 2)
        per_head = lambda t: t.repeat_interleave(self.group, 1)
        prior = None
        if self.beacon and self.beacon.prior:
            prior = per_head(append(cache, "prior", self.beacon.prior(x).transpose(1, 2), 2))
        visible = context.keys(self.window)
        if self.gd is None:
            score = q @ per_head(k).mT / math.sqrt(self.d)
            score = score if prior is None else score + prior[:, :, None]
            # A row without a token has no weight.
            return score.masked_fill(~visible, -INF).softmax(-1).nan_to_num() @ per_head(v)
        return self.selection(q, per_head(k), per_head(v), prior, visible)

    def energy(self, q, k, prior):
        """Selection energies [B, H, N, M]."""
        beta = self.gd.beta.exp()[:, None, None]
        if self.select["score"] == "dot":
            energy = -beta * (q @ k.mT)
        else:
            energy = beta * (q.square().sum(-1)[..., None] + k.square().sum(-1)[:, :, None] - 2 * q @ k.mT)
        return energy if prior is None else energy - prior[:, :, None]

    def ranks(self, energy):
        """Rank of each key in its row by ascending energy. `tie` decides the order of equal energies."""
        if self.select["tie"] == "last":
            return energy.flip(-1).argsort(dim=-1, stable=True).argsort(dim=-1).flip(-1)
        return energy.argsort(dim=-1, stable=True).argsort(dim=-1)

    def selection(self, q, k, v, prior, visible):
        """Finds the candidates and runs the rounds of selection: [B, H, N, D]."""
        select, learned = self.select, prior
        if select["norm_prior"]:
            norms = self.gd.beta.exp()[:, None] * k.square().sum(-1)
            prior = norms if prior is None else prior + norms
        energy = self.energy(q, k, prior).masked_fill(~visible, INF)
        protected = torch.zeros_like(energy, dtype=torch.bool)
        if self.protected and learned is not None:
            order = (-learned[:, :, None]).expand_as(energy).masked_fill(~visible, INF)
            protected = (order.argsort(dim=-1, stable=True).argsort(dim=-1) < self.protected) & energy.isfinite()
        members = energy.isfinite()
        if select["estimator"] != "dense":
            members = members & ((self.ranks(energy) < select["candidates"]) | protected)
        tau = self.gd.threshold[:, None, None] if hasattr(self.gd, "threshold") else None
        if hasattr(self.gd, "threshold_slope"):
            # By the number of keys that each query sees.
            length = visible.sum(-1, keepdim=True).clamp(min=1).to(tau.dtype).log()
            tau = tau + self.gd.threshold_slope[:, None, None] * length
        shares = [torch.ones(self.reading, device=q.device)]
        if hasattr(self.gd, "rounds"):
            shares = list((self.gd.rounds + torch.eye(1, self.gd.rounds.shape[1], device=q.device)).unbind(1))
        y, alive = torch.zeros_like(q), torch.ones_like(energy[..., :1], dtype=torch.bool)
        for share in shares:
            alive = alive & members.any(-1, keepdim=True)
            output, winner, admitted = self.round(q, k, v, prior, members, protected & members, tau)
            y = y + torch.where(alive, share.to(q.dtype)[:, None, None] * output, 0)
            # The next round uses the component of the query that is orthogonal to its jump to the winner, and the
            # remaining candidates.
            jump = (winner.to(k.dtype) @ k) - q
            length = jump.norm(dim=-1, keepdim=True)
            g = torch.where(length > 0, jump / length, 0)
            q = q - (q * g).sum(-1, keepdim=True) * g
            members, alive = members & ~winner, alive & admitted
        return y

    @property
    def gate_temperature(self):
        """The temperature of the energy or margin gate."""
        (gate,) = self.select["gate"].values()
        return gate["temperature"]

    def picks(self, energy, limit, null, v):
        """The values of the keys of least energy, with their weights beside the null slot of the gate."""
        gated = isinstance(self.select["gate"], dict)
        temperature = self.gate_temperature if gated else 1.0
        picked = (self.ranks(energy) < self.select["picks"]) & energy.isfinite()
        slots = energy.masked_fill(~picked, INF)
        slots = torch.cat([slots, null], -1) if gated else slots
        weights = (slots / -temperature).softmax(-1).nan_to_num()[..., : energy.shape[-1]]
        return weights.masked_fill(energy > limit, 0) @ v

    def round(self, q, k, v, prior, members, protected, tau):
        """One round of selection. Returns its output [B, H, N, D], the winner [B, H, N, M] as a mask, and whether the
        threshold admits the winner [B, H, N, 1]."""
        select = self.select
        score = -self.energy(q, k, prior).masked_fill(~members, INF)
        if self.rule:
            score = barrier(score, members, protected, self.rule)
        energy = -score
        winner = members & (self.ranks(energy) == 0)
        least = energy.amin(-1, keepdim=True)
        null = torch.full_like(least, INF) if tau is None else tau.expand_as(least)
        if "margin" in select["gate"]:
            # The threshold is relative to the first candidate that is not read.
            null = null + energy.masked_fill(self.ranks(energy) < select["picks"], INF).amin(-1, keepdim=True)
        limit = null
        if isinstance(select["gate"], dict):
            # rho >= exclude_below, as a limit of the energy.
            below, temperature = select["exclude_below"], self.gate_temperature
            limit = null + (temperature * math.log((1 - below) / below) if below else INF)
        admitted = members.any(-1, keepdim=True) & (least <= limit)
        if select["estimator"] == "blend":
            slots = torch.cat([energy, null], -1) / -select["temperature"]
            return slots.softmax(-1)[..., :-1].nan_to_num() @ v, winner, admitted
        if select["picks"] > 1:
            return self.picks(energy, limit, null, v), winner, admitted
        rho = torch.ones_like(least)
        if isinstance(select["gate"], dict):
            rho = torch.sigmoid((null - least) / self.gate_temperature)
        elif select["gate"] == "coherence":
            t = self.gd.beta.exp()[:, None, None] * ((winner.to(k.dtype) @ k) - q).square().sum(-1, keepdim=True)
            rho = density(t, self.gd.alpha.sigmoid()[:, None, None], select["coherence"]).to(q.dtype)
        return torch.where(admitted, rho * (winner.to(v.dtype) @ v), 0), winner, admitted


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(c, width, bias=bias), nn.Linear(c, width, bias=bias)
        self.down_proj = nn.Linear(width, c, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), Mlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, context, cache):
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, context, cache):
        x = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, context, None if cache is None else cache.layer(index))
        return self.norm(x)


class GdForCausalLM(PreTrainedModel, GenerationMixin):
    """Computes the logits [B, N, V] of token ids [B, N]."""

    config_class = GdConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *_):
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            name = generation_config.cache_implementation
            raise ValueError(f"cache_implementation {name!r} is not implemented in modeling_gd.py")
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = GdCache()

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, past_key_values=None, **_):
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        use_cache = past_key_values is not None
        return {
            "input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        """`attention_mask` [B, M] is 0 for padding, which must be on the left, and covers the positions in the cache."""
        for name in ("inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not implemented in modeling_gd.py")
        cache = past_key_values
        if cache is None and use_cache:
            cache = GdCache()
        if cache is not None and not isinstance(cache, GdCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}, not a GdCache")
        b, n = input_ids.shape
        m = n + (cache.length if cache is not None else 0)
        visible = torch.ones(b, m, device=input_ids.device) if attention_mask is None else attention_mask
        if tuple(visible.shape) != (b, m):
            raise ValueError(f"attention_mask {list(visible.shape)} is not [{b}, {m}]")
        visible = visible.bool()
        if bool((visible[:, :-1] & ~visible[:, 1:]).any()):
            raise ValueError("padding must be on the left: attention_mask has a 0 after a 1")
        tokens, positions = int(visible.sum(-1).max()), self.config.max_position_embeddings
        if tokens > positions:
            raise ValueError(f"{tokens} tokens exceed the {positions} positions of the model")
        hidden = self.model(input_ids, Context(visible, n, frequencies(self.config)), cache)
        if cache is not None:
            cache.length = m
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=cache)
