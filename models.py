"""The five models: GPT2, GPT2Simple, Llama, LlamaSimple, LlamaSimpleMLP.

All are pre-norm decoders with the unembedding tied to the embedding; they differ in norms, positions, MLP and in
what their modules are called. Parameter names, initial weights and outputs are those of SPD's classes of the same
names (goodfire-ai/spd, spd/pretrain/models), so weights move between the two with strict=True.

    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(n_layer=2, n_head=4, n_embd=128, n_key_value_heads=2))
    logits, loss = model(idx, targets)  # (B, T) int64 each -> (B, T, V), mean cross-entropy in nats
"""

import contextlib
import functools
import math
import warnings
import zipfile
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# -----------------------------------------------------------------------------
# configs: SPD's fields, in SPD's order, with SPD's defaults


@dataclass
class GPT2Config:
    """Shape of a GPT2. Raises ValueError for a shape that cannot be built."""

    model_type: str = "GPT2"
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    flash_attention: bool = True  # F.scaled_dot_product_attention; false: an explicit softmax, which can be hooked

    def __post_init__(self):
        check_shape(self)


@dataclass
class GPT2SimpleConfig(GPT2Config):
    """Shape of a GPT2Simple: GPT2's fields."""

    model_type: str = "GPT2Simple"


@dataclass
class LlamaConfig:
    """Shape of a Llama. Raises ValueError for a shape that cannot be built."""

    model_type: str = "Llama"
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_intermediate: int = 2048  # SwiGLU has a third matrix, so 2/3 of 4*n_embd costs as much as GPT-2's MLP
    mlp_bias: bool = False
    attn_bias: bool = False
    rotary_adjacent_pairs: bool = False  # RoPE pairs (2i, 2i+1) instead of (i, i + head size / 2)
    rotary_dim: int = 64  # without effect, as in SPD: RoPE turns the whole head
    rotary_base: int = 10000
    n_ctx: int = 1024  # positions in the RoPE tables: equal to block_size
    n_key_value_heads: int = 3
    use_grouped_query_attention: bool = True  # false: one merged c_attn, and as many key/value heads as query heads
    flash_attention: bool = True  # F.scaled_dot_product_attention; false: an explicit softmax, which can be hooked
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        check_shape(self)


@dataclass
class LlamaSimpleConfig(LlamaConfig):
    """Shape of a LlamaSimple: Llama's fields."""

    model_type: str = "LlamaSimple"


@dataclass
class LlamaSimpleMLPConfig(LlamaConfig):
    """Shape of a LlamaSimpleMLP: Llama's fields, with a wider MLP, since a GELU MLP has two matrices, not three."""

    model_type: str = "LlamaSimpleMLP"
    n_intermediate: int = 3072


def check_shape(c) -> None:
    """Raise ValueError, naming the fields, if no model can have the shape `c`."""
    expected = type(c).__name__.removesuffix("Config")
    if c.model_type != expected:
        raise ValueError(f"model_type is {c.model_type!r}, but these are the fields of a {expected}")
    for f in fields(c):
        value = getattr(c, f.name)
        if f.type is int and (type(value) is not int or not 1 <= value <= 2**31):
            raise ValueError(f"{f.name} must be a whole number from 1 to {2**31}, not {value!r}")
    if c.n_embd % c.n_head:
        raise ValueError(f"n_embd ({c.n_embd}) must be divisible by n_head ({c.n_head})")
    if isinstance(c, LlamaConfig):
        head_size = c.n_embd // c.n_head
        if head_size % 2:
            raise ValueError(f"n_embd / n_head ({head_size}) must be even: RoPE turns pairs of dimensions")
        if c.use_grouped_query_attention and c.n_head % c.n_key_value_heads:
            raise ValueError(f"n_head ({c.n_head}) must be divisible by n_key_value_heads ({c.n_key_value_heads})")
        if c.n_ctx != c.block_size:
            raise ValueError(f"n_ctx ({c.n_ctx}) must equal block_size ({c.block_size})")
        if not c.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be above 0, not {c.rms_norm_eps!r}")
        if c.rotary_dim != head_size:
            warnings.warn(
                f"rotary_dim {c.rotary_dim} has no effect: RoPE turns whole heads of {head_size} dimensions",
                stacklevel=4,
            )


# -----------------------------------------------------------------------------
# parts, each written once


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()  # x² overflows in float16 and loses digits in bfloat16
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def pairs(x, adjacent: bool):
    """The first and the second of each pair of dimensions that RoPE turns, (..., hs / 2) each, of x (..., hs)."""
    return (x[..., ::2], x[..., 1::2]) if adjacent else x.chunk(2, dim=-1)


def rotary_tables(head_dim: int, n_ctx: int, base: int, adjacent_pairs: bool):
    """cos, sin, each (n_ctx, hs) float32, of the angles t / base^(2i / hs), the same for both of pair i."""
    freq = base ** (torch.arange(head_dim // 2, dtype=torch.float32) / (head_dim / 2))
    freq = freq.repeat_interleave(2) if adjacent_pairs else freq.repeat(2)
    angles = torch.arange(n_ctx, dtype=torch.float32)[:, None] / freq
    return angles.cos(), angles.sin()


def apply_rotary_pos_emb(q, k, cos, sin, adjacent_pairs: bool):
    """Turn the pairs of dimensions of q, k (B, nh, T, hs) by their positions' angles; cos, sin (B or 1, T, hs)."""
    cos, sin = (pairs(table, adjacent_pairs)[0].unsqueeze(1) for table in (cos, sin))  # (B or 1, 1, T, hs / 2)
    turned = []
    for x in (q, k):
        x1, x2 = pairs(x, adjacent_pairs)
        y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        turned.append(torch.stack(y, dim=-1).flatten(-2) if adjacent_pairs else torch.cat(y, dim=-1))
    return turned


# whether this machine's CPU has units for products of bfloat16
BF16_CPU = any(getattr(torch.cpu, "get_capabilities", dict)().get(unit) for unit in ("amx_bf16", "avx512_bf16"))


def explicit_attention(q, k, v, softmax, blocks: int = 1):
    """Causal attention of q, k, v (B, nh, T, hs) -> the same, for each block of queries over the keys up to it."""
    T, hs, out, start = q.size(-2), q.size(-1), [], 0
    for rows in q.split(-(-T // blocks), dim=-2):
        stop = start + rows.size(-2)
        att = rows @ k[..., :stop, :].transpose(-2, -1) / math.sqrt(hs)  # (B, nh, rows, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        out.append(softmax(att.masked_fill(future, float("-inf"))) @ v[..., :stop, :])
        start = stop
    return torch.cat(out, dim=-2)


class CausalSelfAttention(nn.Module):
    """Causal attention with four spellings of its projections.

    `merged` says which of q, k, v share one nn.Linear: "qkv" (c_attn), "kv" (q_attn, kv_attn) or "" (q_proj, k_proj,
    v_proj). `out` is the output projection's name.
    """

    def __init__(self, config, merged: str, out: str):
        super().__init__()
        C, llama = config.n_embd, isinstance(config, LlamaConfig)
        bias = config.attn_bias if llama else True
        # SPD's scripts compute patterns of attention from these names
        self.n_head, self.n_embd, self.block_size = config.n_head, C, config.block_size
        self.n_key_value_heads = config.n_key_value_heads if llama and merged != "qkv" else config.n_head
        self.repeat_kv_heads = self.n_head // self.n_key_value_heads
        self.head_dim = C // config.n_head
        kv_size = self.n_key_value_heads * self.head_dim
        self.merged, self.out, self.flash_attention = merged, out, config.flash_attention
        if merged == "qkv":
            self.c_attn = nn.Linear(C, 3 * C, bias=bias)
        elif merged == "kv":
            self.q_attn = nn.Linear(C, C, bias=bias)
            self.kv_attn = nn.Linear(C, 2 * kv_size, bias=bias)
        else:
            self.q_proj = nn.Linear(C, C, bias=bias)
            self.k_proj = nn.Linear(C, kv_size, bias=bias)
            self.v_proj = nn.Linear(C, kv_size, bias=bias)
        self.add_module(out, nn.Linear(C, C, bias=bias))
        getattr(self, out).writes_residual = True
        self.softmax = nn.Softmax(dim=-1)  # a module, so that a forward hook sees the pattern and may replace it
        self.rotary = llama
        if llama:
            self.rotary_adjacent_pairs = adjacent = config.rotary_adjacent_pairs
            # SPD's losses on attention patterns look for it, and pass it rows of the tables
            self.apply_rotary_pos_emb = functools.partial(apply_rotary_pos_emb, adjacent_pairs=adjacent)
            cos, sin = rotary_tables(self.head_dim, config.n_ctx, config.rotary_base, adjacent)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)

    @property
    def bias(self):
        """The causal mask (1, 1, block_size, block_size), 1 where a query sees the key: for SPD's scripts alone."""
        device = next(self.parameters()).device
        return torch.ones(self.block_size, self.block_size, device=device).tril()[None, None]

    def qkv(self, x):
        """x (B, T, C) -> q (B, T, C), k and v (B, T, nkv * hs)."""
        if self.merged == "qkv":
            return self.c_attn(x).chunk(3, dim=-1)
        if self.merged == "kv":
            return self.q_attn(x), *self.kv_attn(x).chunk(2, dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for z in self.qkv(x))  # (B, nh or nkv, T, hs)
        if self.rotary:
            cos, sin = (table[None, :T].to(q.dtype) for table in (self.rotary_cos, self.rotary_sin))
            q, k = self.apply_rotary_pos_emb(q, k, cos, sin)
        if self.repeat_kv_heads > 1:
            k = k.repeat_interleave(self.repeat_kv_heads, dim=1)  # (B, nh, T, hs)
            v = v.repeat_interleave(self.repeat_kv_heads, dim=1)
        if not self.flash_attention:
            y = explicit_attention(q, k, v, self.softmax)
        elif BF16_CPU and q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.compiler.is_compiling():
            # (16, 4, 512, 32), forward and backward, on 2 cores with bfloat16 units: 55 ms, where SDPA takes 99
            y = explicit_attention(q, k, v, functools.partial(F.softmax, dim=-1), blocks=4)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return getattr(self, self.out)(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """out(gelu(c_fc(x))); `out` is the second projection's name."""

    def __init__(self, n_embd: int, n_intermediate: int, bias: bool, out: str):
        super().__init__()
        self.out = out
        self.c_fc = nn.Linear(n_embd, n_intermediate, bias=bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.add_module(out, nn.Linear(n_intermediate, n_embd, bias=bias))
        getattr(self, out).writes_residual = True

    def forward(self, x):
        return getattr(self, self.out)(self.gelu(self.c_fc(x)))


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)); SPD gives its output projection the initial scale of any other."""

    def __init__(self, n_embd: int, n_intermediate: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, n_intermediate, bias=bias)
        self.up_proj = nn.Linear(n_embd, n_intermediate, bias=bias)
        self.down_proj = nn.Linear(n_intermediate, n_embd, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, merged: str, attn_out: str, mlp_out: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, merged, attn_out)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config.n_embd, 4 * config.n_embd, True, mlp_out)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig, merged: str, attn_out: str, gelu_mlp: bool):
        super().__init__()
        sizes = config.n_embd, config.n_intermediate, config.mlp_bias
        self.rms_1 = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.attn = CausalSelfAttention(config, merged if config.use_grouped_query_attention else "qkv", attn_out)
        self.rms_2 = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = MLP(*sizes, "down_proj") if gelu_mlp else SwiGLU(*sizes)

    def forward(self, x):
        x = x + self.attn(self.rms_1(x))
        return x + self.mlp(self.rms_2(x))


# -----------------------------------------------------------------------------
# the loss, without the logits of all positions at once

VOCAB_MULTIPLE = {"cuda": 64}  # bfloat16 products of an odd width miss the fast kernels


def mean_loss(logits, targets):
    """logits (N, V), targets (N,) -> the mean cross-entropy in nats over the targets that are not -1."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=-1)


def loss_in_pieces(hidden, weight, targets, with_gradients: bool):
    """hidden (N, C), weight (V, C), targets (N,) -> (loss, gradients of its sum by hidden and weight, or None).

    The loss is the mean cross-entropy of hidden @ weight.T at the targets that are not -1. A piece of rows leaves its
    share of the gradients while its logits are there: nothing is computed twice. Against F.cross_entropy, on 2 cores,
    a step of the 2-layer, width 128 model takes 0.77 of the time (0.90 compiled).
    """
    N, V, device = len(hidden), len(weight), hidden.device.type
    dtype, wide = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = -(-N // 4)
    if not torch.compiler.is_compiling():  # which makes code of every piece
        rows = min(rows, max(512, 2 ** (22 if device == "cpu" else 28) // V))  # a CPU's caches hold one piece
    w, loss, grad_hidden, grad_weight = weight.to(dtype), hidden.new_zeros((), dtype=wide), [], None
    if padding := -V % VOCAB_MULTIPLE.get(device, 1):
        w = F.pad(w, (0, 0, 0, padding))
    for h, y in zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True):
        logits = h @ w.T  # (rows, V)
        logits[:, V:] = float("-inf")
        logp = F.log_softmax(logits, dim=-1, dtype=wide)
        loss = loss + F.nll_loss(logp, y, ignore_index=-1, reduction="sum")
        if with_gradients:
            # of the sum, not the mean: of order 1, so that float16 holds them; backward multiplies by all the rest
            one = torch.ones_like(y, dtype=wide)[:, None]
            d = logp.exp_().scatter_add_(1, y.clamp(min=0)[:, None], -one).to(dtype)  # by logits (rows, V)
            counts = (y != -1)[:, None].to(dtype)
            grad_hidden.append(d @ w * counts)
            h = h * counts
            if grad_weight is None:
                grad_weight = (d.T @ h).to(torch.promote_types(weight.dtype, torch.float32))
            elif grad_weight.dtype == dtype:
                grad_weight.addmm_(d.T, h)
            else:
                grad_weight += d.T @ h
    if with_gradients:
        grad_hidden, grad_weight = torch.cat(grad_hidden), grad_weight[:V]
    return loss / (targets != -1).sum(), grad_hidden, grad_weight


class LossInPieces(torch.autograd.Function):
    """loss_in_pieces with its gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        loss, *gradients = loss_in_pieces(hidden, weight, targets, True)
        ctx.save_for_backward(hidden, weight, targets, *gradients)
        return loss

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            hidden, weight = hidden.view_as(hidden), weight.view_as(weight)  # a tied weight is behind hidden, too
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
            loss = mean_loss(hidden.to(dtype) @ weight.to(dtype).T, targets)
            return *torch.autograd.grad(loss, (hidden, weight), grad, create_graph=True), None
        grad = grad / (targets != -1).sum().clamp(min=1)
        return grad_hidden.to(hidden.dtype) * grad, (grad_weight * grad).to(weight.dtype), None


# -----------------------------------------------------------------------------
# Muon


class Float32ForBfloat16(TorchFunctionMode):
    """Within it x.bfloat16() is x.float()."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.Tensor.float if func is torch.Tensor.bfloat16 else func)(*args, **(kwargs or {}))


class MuonAndAdamW:
    """Both as one optimizer."""

    def __init__(self, muon, adamw):
        self.muon, self.adamw = muon, adamw
        self.found_inf = None  # as AdamW's fused kernel reads it: a device's 0.0 or 1.0; at 1.0 no weight changes

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self) -> None:
        params = [p for group in self.muon.param_groups for p in group["params"]]
        before = [p.clone() for p in params] if self.found_inf is not None else params
        # Muon orthogonalises in bfloat16: 17 times the time of float32 on a CPU without bfloat16 units
        with Float32ForBfloat16() if params[0].device.type == "cpu" else contextlib.nullcontext():
            self.muon.step()
        for p, old in zip(params, before, strict=True):
            if self.found_inf is not None:
                p.copy_(torch.where(self.found_inf > 0, old, p))  # Muon has no such flag; to ask for it would wait
        self.adamw.found_inf = self.found_inf
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


# -----------------------------------------------------------------------------
# what all five share


def load_file(path):
    """What torch.save wrote to `path`, on the CPU. Raises one of many exceptions if the file is damaged."""
    if zipfile.is_zipfile(path):  # as all but very old files are
        with zipfile.ZipFile(path) as f:
            if name := f.testzip():  # torch.load looks at no checksum
                raise ValueError(f"the checksum of {name} in it is wrong: the file changed after it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


class LanguageModel(nn.Module):
    """A child's `build` registers wte, h and ln_f, in the order in which their weights are drawn."""

    config_class: type
    _h = property(lambda self: self.h)  # SPD's scripts call the blocks so

    def __init__(self, config, init_seed: int = 42):
        super().__init__()
        self.config = config
        self.build(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        if not self.lm_head.weight.is_meta:
            self.draw_weights(torch.Generator().manual_seed(init_seed))

    def __setattr__(self, name, value):
        if isinstance(getattr(type(self), name, None), property):  # nn.Module would register a second, unused child
            raise AttributeError(f"{type(self).__name__}.{name} is another name of a registered module: assign to that")
        super().__setattr__(name, value)

    def draw_weights(self, rng: torch.Generator) -> None:
        """N(0, 0.02), less where a block writes to the residual; biases 0."""
        for module in self.modules():
            if module is self.lm_head or not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            residual = getattr(module, "writes_residual", False)
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            nn.init.normal_(module.weight, mean=0.0, std=std, generator=rng)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, idx):
        """idx (B, T) int64 -> what the unembedding reads, (B, T, C)."""
        x = self.wte(idx)
        if isinstance(self.config, GPT2Config):
            x = x + self.wpe(torch.arange(idx.shape[-1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, idx, targets=None, return_logits: bool = True):
        """idx (B, T) int64, targets (B, T) int64 or None -> logits (B, T, V) or None, loss or None.

        The loss is the mean cross-entropy in nats over the targets that are not -1. Raises ValueError for a sequence
        over block_size and, on the CPU, for a token id outside the vocabulary (a GPU would have to wait for the check).
        """
        T, V = idx.shape[-1], self.config.vocab_size
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size ({self.config.block_size})")
        try:
            hidden = self.hidden(idx)  # (B, T, C)
        except IndexError:
            self.check_ids(idx)
            raise
        targets = None if targets is None else targets.reshape(-1).long()
        if targets is not None and not return_logits and self.plain_head():
            args = hidden.flatten(0, -2), self.lm_head.weight, targets
            wanted = torch.is_grad_enabled() and (hidden.requires_grad or self.lm_head.weight.requires_grad)
            return None, LossInPieces.apply(*args) if wanted else loss_in_pieces(*args, False)[0]
        logits = self.lm_head(hidden)  # (B, T, V)
        loss = None if targets is None else mean_loss(logits.reshape(-1, V), targets)
        return (logits if return_logits else None), loss

    def plain_head(self) -> bool:
        """Whether lm_head is the nn.Linear it was made as, and nobody has to see its logits or to transform them."""
        head = self.lm_head
        heard = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
        changed = any(heard) or "forward" in vars(head) or torch._C._are_functorch_transforms_active()
        return type(head) is nn.Linear and head.bias is None and not changed

    def flops_per_token(self) -> int:
        """Of a training step: 6 a weight that is multiplied by, and attention's products as if it saw the future."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def check_ids(self, idx) -> None:
        """Raise ValueError if idx (any shape, int64) holds a token id outside the vocabulary."""
        bad = idx[(idx < 0) | (idx >= self.config.vocab_size)]
        if bad.numel():
            raise ValueError(f"token id {bad[0].item()} is outside the vocabulary of {self.config.vocab_size}")

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k=None, eos_token_id=None):
        """idx (T,) or (B, T) int64 -> the same with up to max_new_tokens more.

        Temperature 0 is greedy; top_k keeps the k likeliest. After eos_token_id a row holds only that id, and when
        all rows have met it, generation ends. Sampling draws from torch's global generator.
        """
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature ({temperature}) must be at least 0 and top_k ({top_k}) at least 1")
        one_dim = idx.dim() == 1
        idx = idx[None] if one_dim else idx
        if idx.numel() == 0:
            raise ValueError("an empty prompt: begin with a token, such as the tokenizer's EOS")
        self.check_ids(idx)
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1].float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                temperature = max(temperature, 1e-6)  # or else float32 would not hold the quotient
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            if eos_token_id is not None:
                new = new.masked_fill(done, eos_token_id)
                done |= new == eos_token_id
            idx = torch.cat((idx, new), dim=1)
            if done.all():
                break
        return idx[0] if one_dim else idx

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, zero_stage=0, muon=False):
        """AdamW that decays tensors of two dimensions and more; with `muon`, Muon for the matrices inside blocks.

        zero_stage 1 shards its state over the ranks of the process group, where there is one. Raises ValueError for
        stages 2 and 3, and for Muon with stage 1 or a torch that has none.
        """
        if zero_stage not in (0, 1):
            raise ValueError(f"zero_stage {zero_stage} is not supported: 0 keeps all optimizer state, 1 shards it")
        params = [p for p in self.parameters() if p.requires_grad]
        if muon:
            if zero_stage == 1:
                raise ValueError("Muon's state cannot be sharded: set zero_stage to 0")
            if not hasattr(torch.optim, "Muon"):
                raise ValueError(f"Muon needs torch 2.9 or later, and this is {torch.__version__}: use AdamW")
            matrices = [p for p in self.h.parameters() if p.requires_grad and p.dim() == 2]
            params = [p for p in params if all(p is not m for m in matrices)]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # by type: SPD compares the whole device string with "cuda", so its ranks, on "cuda:0", lose the fused kernel
        fused = torch.device(device_type).type in ("cuda", "cpu", "mps")
        if zero_stage == 1 and torch.distributed.is_initialized():
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(
                groups, optimizer_class=torch.optim.AdamW, lr=learning_rate, betas=betas, fused=fused
            )
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
        if not muon:
            return adamw
        # an update as large as AdamW's, whatever the matrix's shape: one learning rate fits both
        muon = torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
        return MuonAndAdamW(muon, adamw)

    @classmethod
    def from_run_info(cls, run_info):
        """The trained model of a run_info.PretrainRunInfo, on the CPU, its weights loaded with strict=True."""
        model = cls(cls.config_class(**run_info.model_config_dict))
        state = load_file(run_info.checkpoint_path)
        # older checkpoints carry the wrappers' prefixes and buffers that are computed here
        state = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in state.items()}
        buffers = (".attn.bias", ".rotary_sin", ".rotary_cos")
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in state.items() if k in own or not k.endswith(buffers)})
        return model

    @classmethod
    def from_pretrained(cls, path):
        """The trained model at `path`: a run, on disk or on W&B, as run_info.PretrainRunInfo.from_path finds it, or
        Hugging Face's: a folder with its config.json, or a hub id such as gpt2.
        """
        from run_info import pretrained_model

        return pretrained_model(cls, path)[0]


# -----------------------------------------------------------------------------
# the five models


class GPT2(LanguageModel):
    """GPT-2: learned positions, LayerNorm, a GELU MLP, one merged q, k, v projection; biases everywhere."""

    config_class = GPT2Config
    h = property(lambda self: self.h_torch)

    def build(self, config: GPT2Config) -> None:
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h_torch = nn.ModuleList(GPT2Block(config, "qkv", "c_proj", "c_proj") for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)


class GPT2Simple(LanguageModel):
    """GPT-2 with q, k, v as separate projections."""

    config_class = GPT2SimpleConfig

    def build(self, config: GPT2SimpleConfig) -> None:
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, "", "o_proj", "down_proj") for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)


class Llama(LanguageModel):
    """Llama: RoPE, RMSNorm, SwiGLU, grouped key/value heads in one merged projection."""

    config_class = LlamaConfig
    wte = property(lambda self: self.transformer["wte"])
    h = property(lambda self: self.transformer["h"])
    ln_f = property(lambda self: self.transformer["rms_f"])

    def build(self, config: LlamaConfig) -> None:
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(LlamaBlock(config, "kv", "c_proj", False) for _ in range(config.n_layer)),
                "rms_f": RMSNorm(config.n_embd, config.rms_norm_eps),
            }
        )


class LlamaSimple(LanguageModel):
    """Llama with q, k, v as separate projections."""

    config_class = LlamaSimpleConfig
    gelu_mlp = False

    def build(self, config: LlamaSimpleConfig) -> None:
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(LlamaBlock(config, "", "o_proj", self.gelu_mlp) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.rms_norm_eps)


class LlamaSimpleMLP(LlamaSimple):
    """LlamaSimple with GPT-2's GELU MLP: the model that SPD takes apart most."""

    config_class = LlamaSimpleMLPConfig
    gelu_mlp = True


MODEL_CLASSES: dict[str, type] = {c.__name__: c for c in (GPT2, GPT2Simple, Llama, LlamaSimple, LlamaSimpleMLP)}
