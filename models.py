"""The five models: GPT2, GPT2Simple, Llama, LlamaSimple and LlamaSimpleMLP.

All are pre-norm decoders whose unembedding is tied to the embedding. They differ in norms, positions, MLP, and in the
names of their modules. Parameter names, initial weights and outputs are those of SPD's classes of the same names
(goodfire-ai/spd, spd/pretrain/models), so checkpoints load in both directions with strict=True.

    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(n_layer=2, n_head=4, n_embd=128, n_key_value_heads=2))
    logits, loss = model(idx, targets)  # (B, T) int64 each -> (B, T, V), mean cross-entropy in nats
"""

import json
import math
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# Configs: SPD's fields, with SPD's defaults.


@dataclass
class GPT2Config:
    """Shape of a GPT2. Raises ValueError for a shape that cannot be built."""

    model_type: Literal["GPT2"] = "GPT2"
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    flash_attention: bool = True  # F.scaled_dot_product_attention; false: an explicit softmax, which can be hooked

    def __post_init__(self):
        expected = type(self).model_type  # a dataclass keeps its defaults as class attributes
        if self.model_type != expected:
            raise ValueError(f"model_type is {self.model_type!r}, but these are the fields of a {expected}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value <= 2**31):
                raise ValueError(f"{field.name} must be a whole number from 1 to {2**31}, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


@dataclass
class GPT2SimpleConfig(GPT2Config):
    """Shape of a GPT2Simple: the same fields."""

    model_type: Literal["GPT2Simple"] = "GPT2Simple"


@dataclass
class LlamaConfig(GPT2Config):
    """Shape of a Llama: GPT2's fields and more. Raises ValueError for a shape that cannot be built."""

    model_type: Literal["Llama"] = "Llama"
    n_intermediate: int = 2048  # SwiGLU has a third matrix, so 2/3 of 4 * n_embd costs as much as GPT-2's MLP
    mlp_bias: bool = False
    attn_bias: bool = False
    rotary_adjacent_pairs: bool = False  # RoPE pairs (2i, 2i+1) instead of (i, i + head size / 2)
    rotary_dim: int = 64  # has no effect, as in SPD: RoPE rotates the whole head
    rotary_base: int = 10000
    n_ctx: int = 1024  # positions in the RoPE tables; must equal block_size
    n_key_value_heads: int = 3
    use_grouped_query_attention: bool = True  # false: one merged c_attn, and as many key/value heads as query heads
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        head_size = self.n_embd // self.n_head
        if head_size % 2:
            raise ValueError(f"n_embd / n_head ({head_size}) must be even: RoPE rotates pairs of dimensions")
        if self.use_grouped_query_attention and self.n_head % self.n_key_value_heads:
            raise ValueError(
                f"n_head ({self.n_head}) must be divisible by n_key_value_heads ({self.n_key_value_heads})"
            )
        if self.n_ctx != self.block_size:
            raise ValueError(f"n_ctx ({self.n_ctx}) must equal block_size ({self.block_size})")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be above 0, not {self.rms_norm_eps!r}")
        if self.rotary_dim != head_size:
            warnings.warn(
                f"rotary_dim {self.rotary_dim} has no effect: RoPE rotates whole heads of {head_size} dimensions",
                stacklevel=3,  # points at the line that builds the config
            )


@dataclass
class LlamaSimpleConfig(LlamaConfig):
    """Shape of a LlamaSimple: the same fields."""

    model_type: Literal["LlamaSimple"] = "LlamaSimple"


@dataclass
class LlamaSimpleMLPConfig(LlamaConfig):
    """Shape of a LlamaSimpleMLP: the same fields, with a wider MLP, since a GELU MLP has two matrices, not three."""

    model_type: Literal["LlamaSimpleMLP"] = "LlamaSimpleMLP"
    n_intermediate: int = 3072


# -----------------------------------------------------------------------------
# Attention, with the names of each model's projections. B: batch, T: tokens, C: n_embd, nh: heads, hs: head size.


# Which of q, k, v share one nn.Linear -> the names of the projections, and how many of the three each computes.
PROJECTIONS = {
    "qkv": {"c_attn": 3},
    "kv": {"q_attn": 1, "kv_attn": 2},
    "": {"q_proj": 1, "k_proj": 1, "v_proj": 1},
}


class CausalSelfAttention(nn.Module):
    """Causal self-attention without positions.

    `merged` is a key of PROJECTIONS, `out` the name of the output projection. The class and these arguments decide what
    is built: `config` may be any object with the fields of a config.
    """

    def __init__(self, config, merged: str, out: str, bias: bool, n_key_value_heads: int):
        super().__init__()
        self.projections = PROJECTIONS[merged]
        self.out = out
        self.flash_attention = config.flash_attention
        # SPD's scripts read these six names to compute attention patterns of their own.
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.block_size = config.block_size
        self.n_key_value_heads = n_key_value_heads
        self.repeat_kv_heads = config.n_head // n_key_value_heads
        self.head_dim = config.n_embd // config.n_head

        C = config.n_embd
        for name, n in self.projections.items():
            heads = self.n_head if name.startswith("q") else n * n_key_value_heads
            self.add_module(name, nn.Linear(C, heads * self.head_dim, bias=bias))
        self.add_module(out, nn.Linear(C, C, bias=bias))
        getattr(self, out).writes_residual = True
        # A module, so that a forward hook sees the attention pattern and may replace it.
        self.softmax = nn.Softmax(dim=-1)

    @property
    def bias(self):
        """The causal mask (1, 1, block_size, block_size), 1 where a query sees the key. Only SPD's scripts use it."""
        device = next(self.parameters()).device
        return torch.ones(self.block_size, self.block_size, device=device).tril()[None, None]

    def qkv(self, x):
        """x (B, T, C) -> q (B, T, nh * hs), k and v (B, T, n_key_value_heads * hs)."""
        parts = []
        for name, n in self.projections.items():
            parts += getattr(self, name)(x).chunk(n, dim=-1)
        return parts

    def add_positions(self, q, k):
        """q, k (B, heads, T, hs), returned as they are. RotaryAttention rotates them by their positions."""
        return q, k

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for z in self.qkv(x))  # (B, heads, T, hs)
        q, k = self.add_positions(q, k)
        if self.repeat_kv_heads > 1:
            k = k.repeat_interleave(self.repeat_kv_heads, dim=1)  # (B, nh, T, hs)
            v = v.repeat_interleave(self.repeat_kv_heads, dim=1)
        if self.flash_attention:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = q @ k.mT / math.sqrt(self.head_dim)  # (B, nh, T, T)
            future = torch.ones_like(att, dtype=torch.bool).triu(1)
            y = self.softmax(att.masked_fill(future, float("-inf"))) @ v
        return getattr(self, self.out)(y.transpose(1, 2).flatten(2))  # (B, T, C)


class RotaryAttention(CausalSelfAttention):
    """Causal self-attention with RoPE and, unless q, k and v are merged, grouped key/value heads."""

    def __init__(self, config, merged: str, out: str):
        n_key_value_heads = config.n_head if merged == "qkv" else config.n_key_value_heads
        super().__init__(config, merged, out, config.attn_bias, n_key_value_heads)
        self.rotary_base = config.rotary_base
        self.rotary_adjacent_pairs = config.rotary_adjacent_pairs
        self.compute_tables()

    def compute_tables(self):
        """Set rotary_cos and rotary_sin (block_size, hs), float32: cos and sin of t / base^(2i / hs) for pair i."""
        hs = self.head_dim
        # Computed on the CPU, whatever the default device is, so that every device has the same numbers.
        freq = self.rotary_base ** (torch.arange(0, hs, 2, dtype=torch.float32, device="cpu") / hs)
        freq = freq.repeat_interleave(2) if self.rotary_adjacent_pairs else freq.repeat(2)
        angles = torch.arange(self.block_size, device="cpu")[:, None] / freq
        device = next(self.parameters()).device
        self.rotary_cos = angles.cos().to(device)
        self.rotary_sin = angles.sin().to(device)

    def _apply(self, *args, **kwargs):
        """What .to(), .bfloat16() and to_empty() go through.

        The tables are not buffers: .bfloat16() would round those, and to_empty() would leave them without values.
        """
        super()._apply(*args, **kwargs)
        self.compute_tables()
        return self

    def pairs(self, x):
        """x (..., hs) -> the first and the second of each pair of dimensions, (..., hs / 2) each."""
        return (x[..., ::2], x[..., 1::2]) if self.rotary_adjacent_pairs else x.chunk(2, dim=-1)

    def apply_rotary_pos_emb(self, q, k, cos, sin):
        """Rotate the pairs of q, k (B, heads, T, hs) by the angles of their positions; cos, sin (B or 1, T, hs)."""
        cos, sin = (self.pairs(z)[0].unsqueeze(1).to(q.dtype) for z in (cos, sin))  # (B or 1, 1, T, hs / 2)
        rotated = []
        for x in (q, k):
            x1, x2 = self.pairs(x)
            y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            rotated.append(torch.stack(y, -1).flatten(-2) if self.rotary_adjacent_pairs else torch.cat(y, -1))
        return rotated

    def add_positions(self, q, k):
        T = q.shape[-2]
        return self.apply_rotary_pos_emb(q, k, self.rotary_cos[None, :T], self.rotary_sin[None, :T])


# -----------------------------------------------------------------------------
# Norm, MLPs and blocks, each written once.


class RMSNorm(nn.RMSNorm):
    """torch's, but rounded to the dtype of x before the product with the weight, as in SPD."""

    def forward(self, x):
        # The square overflows in float16 and loses digits in bfloat16.
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class MLP(nn.Sequential):
    """out(gelu(c_fc(x))): the modules run in the order in which they are added. `out` names the second projection."""

    def __init__(self, n_embd: int, n_intermediate: int, bias: bool, out: str = "down_proj"):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, n_intermediate, bias=bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.add_module(out, nn.Linear(n_intermediate, n_embd, bias=bias))
        getattr(self, out).writes_residual = True


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)). As in SPD, its output projection starts with the full 0.02."""

    def __init__(self, n_embd: int, n_intermediate: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, n_intermediate, bias=bias)
        self.up_proj = nn.Linear(n_embd, n_intermediate, bias=bias)
        self.down_proj = nn.Linear(n_intermediate, n_embd, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GPT2Block(nn.Module):
    def __init__(self, config, merged: str, attn_out: str, mlp_out: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, merged, attn_out, bias=True, n_key_value_heads=config.n_head)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config.n_embd, 4 * config.n_embd, True, mlp_out)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, merged: str, attn_out: str, mlp_class: type):
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.attn = RotaryAttention(config, merged if config.use_grouped_query_attention else "qkv", attn_out)
        self.rms_2 = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = mlp_class(config.n_embd, config.n_intermediate, config.mlp_bias)

    def forward(self, x):
        x = x + self.attn(self.rms_1(x))
        return x + self.mlp(self.rms_2(x))


# -----------------------------------------------------------------------------
# The loss. N: tokens, V: vocabulary.


def summed_loss(logits, targets):
    """logits (N, V), targets (N,) -> the sum of the cross-entropy in nats over the targets that are not -1.

    The only place that says what the loss is: LossInPieces differentiates this function.
    """
    logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


class LossInPieces(torch.autograd.Function):
    """summed_loss(hidden @ weight.T, targets) without all logits at once; hidden (N, C), weight (V, C), targets (N,).

    The gradients of a piece of rows are computed while its logits exist, so that nothing is computed twice and
    the logits of all positions, usually the largest tensor of a step, never exist. It can be differentiated once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradients: bool):
        N, V, device = len(hidden), len(weight), hidden.device.type
        dtype = hidden.dtype
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if torch.compiler.is_compiling():
            rows = -(-N // 8)  # few pieces: the compiler unrolls this loop
        else:
            rows = min(-(-N // 4), max(64, 2 ** (21 if device == "cpu" else 27) // V))  # a CPU's cache holds one piece
        w = weight.to(dtype)
        if device == "cuda":
            # nanoGPT pads 50257 to 50304 for the same reason: other widths miss the fast kernels of tensor cores.
            w = F.pad(w, (0, 0, 0, -V % 64))
        # Sums over many rows need float32, also where the products are of bfloat16 or float16.
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = []
        grad_weight = torch.zeros_like(w, dtype=loss.dtype)
        for h, y in zip(hidden.to(dtype).split(rows), targets.split(rows)):
            logits = h @ w.T  # (rows, V), on CUDA with padding
            logits[:, V:] = float("-inf")
            if with_gradients:
                # Of the sum, not of the mean: its gradients are of order 1, so float16 can hold them.
                d, piece = torch.func.grad_and_value(summed_loss)(logits, y)
                grad_hidden.append(d @ w)
                if h.dtype == grad_weight.dtype:
                    grad_weight.addmm_(d.T, h)  # does not store the product, which may be larger than the piece
                else:
                    # Without .float(), torch 2.7 and 2.8 compile this line to one addmm of two dtypes, which fails.
                    grad_weight += (d.T @ h).float()
            else:  # in validation
                piece = summed_loss(logits, y)
            loss = loss + piece  # `loss += piece`, compiled by torch 2.11, makes all gradients 0
        if with_gradients:
            ctx.save_for_backward(torch.cat(grad_hidden).to(hidden.dtype), grad_weight[:V])
        return loss

    @staticmethod
    def backward(ctx, grad):
        # With create_graph=True the gradients below would be treated as constants, which once_differentiable misses.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the loss in pieces can be differentiated once: use return_logits=True")
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


# -----------------------------------------------------------------------------
# What all five models share.


class LanguageModel(nn.Module):
    """A subclass's build() registers wte, h and ln_f in the order in which their weights are drawn."""

    config_class: type
    _h = property(lambda self: self.h)  # the name of the blocks in SPD's scripts

    def __init__(self, config, init_seed: int = 42):
        super().__init__()
        self.config = config
        self.build(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        self.draw_weights(torch.Generator().manual_seed(init_seed))

    def blocks(self, block: type, *args) -> nn.ModuleList:
        """n_layer blocks of a class; `args` follow the config in its arguments."""
        return nn.ModuleList(block(self.config, *args) for _ in range(self.config.n_layer))

    def draw_weights(self, rng: torch.Generator):
        """N(0, 0.02), less for a projection that writes to the residual stream; biases 0."""
        for module in self.modules():
            shares_wte = module is self.lm_head and self.is_tied()
            if shares_wte or not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            std = 0.02
            if hasattr(module, "writes_residual"):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, std=std, generator=rng)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def __setattr__(self, name, value):
        # nn.Module would register the value under the alias as a second, unused child.
        if isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"{name} is an alias of a registered module: assign to that")
        super().__setattr__(name, value)

    def is_tied(self) -> bool:
        return getattr(self.lm_head, "weight", None) is self.wte.weight

    def _apply(self, *args, **kwargs):
        """What .to(), .bfloat16() and to_empty() go through: leaving the meta device would untie lm_head."""
        tied = self.is_tied()
        super()._apply(*args, **kwargs)
        if tied:
            self.lm_head.weight = self.wte.weight
        return self

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As nn.Module's. With assign=True the loaded tensors take the place of the parameters: see _apply."""
        tied = self.is_tied()
        result = super().load_state_dict(state_dict, strict, assign)
        if assign and tied:
            self.lm_head.weight = self.wte.weight
            self.to(self.wte.weight.device)  # the RoPE tables, too
        return result

    def embed(self, idx):
        """idx (B, T) -> what the first block reads, (B, T, C)."""
        return self.wte(idx)

    def forward(self, idx, targets=None, return_logits: bool = True):
        """idx (B, T) int64, targets (B, T) int64 or None -> logits (B, T, V) or None, loss or None.

        The loss is the mean cross-entropy in nats over the targets that are not -1. With return_logits=False it is
        made in pieces and can be differentiated once: for second derivatives, torch.func or hooks on lm_head, ask for
        the logits. Raises ValueError for a sequence longer than block_size and, on a CPU, for a token id outside the
        vocabulary (a GPU would have to wait for that check).
        """
        _, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size ({self.config.block_size})")
        try:
            x = self.embed(idx)  # (B, T, C)
        except IndexError as e:  # of a CPU's nn.Embedding, which does not name the id
            raise ValueError(
                f"token ids from {idx.min()} to {idx.max()} do not fit the vocabulary of {self.config.vocab_size}"
            ) from e
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x), None
        targets = targets.reshape(-1).long()  # (B * T,)
        n_targets = (targets != -1).sum()
        # Training takes the pieces, which use only lm_head's weight. To change the logits, as by a soft cap, replace
        # lm_head by a subclass of nn.Linear: it gets all rows at once.
        if not return_logits and type(self.lm_head) is nn.Linear and self.lm_head.bias is None:
            logits = None
            loss = LossInPieces.apply(x.flatten(0, -2), self.lm_head.weight, targets, torch.is_grad_enabled())
        else:
            logits = self.lm_head(x)  # (B, T, V)
            loss = summed_loss(logits.flatten(0, -2), targets)
        return (logits if return_logits else None), loss / n_targets

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k=None, eos_token_id=None):
        """idx (T,) or (B, T) int64 -> the same with up to max_new_tokens more.

        Temperature 0 is greedy; top_k keeps the k most likely tokens. After eos_token_id a row holds only that id, and
        generation ends when all rows have reached it. Sampling draws from torch's global generator. The model is used
        in the mode that it is in: call eval() first if a fork has added dropout.
        """
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature ({temperature}) must be at least 0 and top_k ({top_k}) at least 1")
        one_dim = idx.dim() == 1
        idx = torch.atleast_2d(idx)
        if idx.numel() == 0:
            raise ValueError("an empty prompt: begin with a token, such as the tokenizer's EOS")
        # There is no cache of keys and values: every new token costs a forward over the whole context.
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1].float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            if temperature < 1e-6:  # 0, or so little that float32 could not hold the quotient
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            if eos_token_id is not None:
                new = new.masked_fill(done, eos_token_id)
                done |= new == eos_token_id
            idx = torch.cat((idx, new), dim=1)
            if done.all():
                break
        return idx[0] if one_dim else idx

    def flops_per_token(self) -> int:
        """Flops of a training step, per token: 6 for each weight of a linear layer, and attention without its mask."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, zero_stage: int = 0, without=()):
        """AdamW of all parameters that require a gradient, with decay on tensors of two dimensions or more.

        zero_stage 1 shards its state over the ranks of the process group, where there is one. `without`: the set of
        parameters that another optimizer trains. Raises ValueError for zero_stage 2 and 3.
        """
        if zero_stage not in (0, 1):
            raise ValueError(f"zero_stage {zero_stage} is not supported: 0 keeps all optimizer state, 1 shards it")
        params = [p for p in self.parameters() if p.requires_grad and p not in without]
        # train.py sets the learning rate of all groups alike, before each update.
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # By type: SPD compares the whole device string with "cuda", so its ranks, on "cuda:0", lose the fused kernel.
        fused = torch.device(device_type).type in ("cuda", "cpu", "mps")
        options = {"lr": learning_rate, "betas": betas, "fused": fused}
        if zero_stage == 1 and torch.distributed.is_initialized():
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **options)
        return torch.optim.AdamW(groups, **options)

    @classmethod
    def from_run_info(cls, run_info):
        """The trained model of a run_info.PretrainRunInfo, on the CPU and in eval mode; weights load with strict=True.

        Raises ValueError if the run has a check.json of this step and the model's loss is not the one in it.
        """
        model = cls(cls.config_class(**run_info.model_config_dict))
        checkpoint = Path(run_info.checkpoint_path)
        state = {}
        for key, tensor in load_file(checkpoint).items():
            # SPD's older checkpoints have the prefixes of wrappers, and buffers that are computed here.
            if not key.endswith((".attn.bias", ".rotary_sin", ".rotary_cos")):
                state[key.replace("_orig_mod.", "").removeprefix("module.")] = tensor
        model.load_state_dict(state)
        model.eval()
        compare_with_check(model, checkpoint)
        return model

    @classmethod
    def from_pretrained(cls, path):
        """The trained model at `path`, in eval mode: a run, on disk or on W&B, as run_info.PretrainRunInfo.from_path
        finds it, or a Hugging Face model: a folder with its config.json, or a hub id such as gpt2.
        """
        from run_info import pretrained_model

        return pretrained_model(cls, path)


def untied_weights(model) -> dict:
    """The weights as param-decomp's safetensors hold them: float32, and the tied weight once, as wte.weight."""
    twice = "lm_head.weight" if model.is_tied() else None
    return {name: w.float().contiguous() for name, w in model.state_dict().items() if name != twice}


def load_file(path):
    """What torch.save or `untied_weights` (in a .safetensors) wrote to `path`, on the CPU. Raises if it is damaged."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors

        weights = load_safetensors(path)
        return {"lm_head.weight": weights["wte.weight"], **weights}
    return torch.load(path, map_location="cpu", weights_only=True)


@torch.no_grad()
def compare_with_check(model: LanguageModel, checkpoint: Path) -> dict:
    """The run's check.json, or {} if it has none of this checkpoint.

    check.json holds a window of n_ctx + 1 token ids and the loss that the model had on it when it was saved. Weights
    can load without an error into a model that computes something else: other RoPE frequencies, another epsilon.
    Raises ValueError if the model's loss is not the one in check.json.
    """
    # The run's folder is checkpoints/'s parent, or, in a copy from W&B, the checkpoint's own.
    files = [folder / "check.json" for folder in checkpoint.parents[:2] if (folder / "check.json").exists()]
    check = json.loads(files[0].read_text()) if files else {}
    if checkpoint.stem != f"model_step_{check.get('step')}":
        return {}
    ids = torch.tensor(check["ids"])[None]  # (1, n_ctx + 1)
    loss = model(ids[:, :-1], ids[:, 1:], return_logits=False)[1].item()
    if not math.isclose(loss, check["loss"], rel_tol=1e-3):
        raise ValueError(
            f"the model loaded from {checkpoint} is not the one that was trained: its loss on the ids in check.json is "
            f"{loss:.4f}, and was {check['loss']:.4f}"
        )
    return check


# -----------------------------------------------------------------------------
# The five models.


class GPT2Simple(LanguageModel):
    """GPT-2: learned positions, LayerNorm, a GELU MLP, q, k, v as separate projections; biases everywhere."""

    config_class = GPT2SimpleConfig

    def build(self, config):
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.build_blocks()
        self.ln_f = nn.LayerNorm(config.n_embd)

    def build_blocks(self):
        self.h = self.blocks(GPT2Block, "", "o_proj", "down_proj")

    def embed(self, idx):
        return self.wte(idx) + self.wpe(torch.arange(idx.shape[-1], device=idx.device))


class GPT2(GPT2Simple):
    """GPT2Simple with GPT-2's own names, and one merged q, k, v projection."""

    config_class = GPT2Config
    h = property(lambda self: self.h_torch)

    def build_blocks(self):
        self.h_torch = self.blocks(GPT2Block, "qkv", "c_proj", "c_proj")


class Llama(LanguageModel):
    """Llama: RoPE, RMSNorm, SwiGLU, grouped key/value heads in one merged projection."""

    config_class = LlamaConfig
    wte = property(lambda self: self.transformer.wte)
    h = property(lambda self: self.transformer.h)
    ln_f = property(lambda self: self.transformer.rms_f)

    def build(self, config):
        # SPD keeps everything but lm_head in a ModuleDict, whose name is part of every parameter's name.
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": self.blocks(LlamaBlock, "kv", "c_proj", SwiGLU),
                "rms_f": RMSNorm(config.n_embd, config.rms_norm_eps),
            }
        )


class LlamaSimple(LanguageModel):
    """Llama with q, k, v as separate projections."""

    config_class = LlamaSimpleConfig
    mlp_class = SwiGLU

    def build(self, config):
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = self.blocks(LlamaBlock, "", "o_proj", self.mlp_class)
        self.ln_f = RMSNorm(config.n_embd, config.rms_norm_eps)


class LlamaSimpleMLP(LlamaSimple):
    """LlamaSimple with GPT-2's GELU MLP: the model that SPD decomposes most."""

    config_class = LlamaSimpleMLPConfig
    mlp_class = MLP


MODEL_CLASSES: dict[str, type] = {c.__name__: c for c in (GPT2, GPT2Simple, Llama, LlamaSimple, LlamaSimpleMLP)}
