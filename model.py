"""A GPT, as in GPT-2 and nanoGPT, and the bigram model that "let's build GPT" starts from.

    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)           # idx, targets (B, T) -> logits (B, T, vocab_size), mean loss
    model.generate(idx, max_new_tokens=100)      # (B, T + 100)
    for token in model.stream(idx, 100): ...     # (B, 1), one token at a time

Shapes: B batch size, T sequence length, C channels (n_embd), V vocabulary size, nh heads, hs = C / nh channels per head.
Parameters have GPT-2's names, so that state dicts pass between this model, nanoGPT and OpenAI's weights.

References: "Attention Is All You Need" (Vaswani et al. 2017), "Language Models are Unsupervised Multitask Learners" (Radford
et al. 2019).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanogpt import kernels


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M."""

    block_size: int = 1024  # context length: the longest sequence that the model sees
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm layers, as in GPT-2
    gelu: Literal["erf", "tanh"] = "erf"  # exact GELU, or the tanh approximation of OpenAI's weights


@dataclass
class KVCache:
    """Keys and values of the tokens so far, so that generation computes them once per token."""

    layers: list[torch.Tensor]  # of each layer: (2, B, nh, max_tokens, hs)
    length: int = 0  # tokens in the cache; lower it to drop the latest ones


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_head must divide n_embd"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, position: int = 0, last_only: bool = False
    ) -> torch.Tensor:
        """Map x (B, T, C) to (B, T, C), or to (B, 1, C) for the last position only.

        `past` is this layer's part of a KVCache, (2, B, nh, max_tokens, hs): it holds the keys and values of the `position`
        tokens before x, and those of x are added to it.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k, v = qkv  # (B, nh, T, hs) each
        if past is not None:  # append our keys and values, and attend to all of them
            past[:, :, :, position : position + T] = qkv[1:]
            k, v = past[:, :, :, : position + T]  # (B, nh, position + T, hs) each
        if last_only:
            q = q[:, :, -1:]

        mask, is_single = None, q.size(2) == 1  # a single query is the last one, and attends to every key
        is_causal = not is_single and position == 0  # query i attends to keys 0 to i
        if not is_single and position > 0:  # query i is at position + i, which is_causal cannot express
            mask = torch.ones(T, position + T, dtype=torch.bool, device=x.device).tril(position)  # (T, position + T)
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu":  # the same result by the fastest kernel
            y = kernels.cpu_attention(qkv, q, k, v, mask, dropout, is_causal)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, -1, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network: expand 4x, GELU, project back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """Pre-LayerNorm transformer block (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, position: int = 0, last_only: bool = False
    ) -> torch.Tensor:
        """Map x (B, T, C) to (B, T, C), or (B, 1, C); the arguments are those of CausalSelfAttention."""
        attended = self.attn(self.ln_1(x), past, position, last_only)
        x = (x[:, -1:] if last_only else x) + attended
        return x + self.mlp(self.ln_2(x))


class LanguageModel(nn.Module):
    """What the GPT and the bigram model share: loss, generation, optimizer."""

    config: GPTConfig

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats: logits (B, T, V), targets (B, T). Targets of -1 are ignored; 0 if all are."""
        total = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1, reduction="sum")
        return total / (targets != -1).sum().clamp(min=1)

    @torch.inference_mode()
    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        vocab_size: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        cache: KVCache | None = None,
    ) -> Iterator[torch.Tensor]:
        """Generate tokens for each row of idx (B, T), T >= 1: yields (B, 1) int64 per step.

        Ends after `max_new_tokens`, or when every row has had one of `stop_tokens`; until then a finished row repeats its
        stop token. `vocab_size` excludes the padding of the model's vocabulary from sampling. `cache` may already hold the
        first `cache.length` tokens of idx, as in a multi-turn chat. See `sample_next` for the rest.
        """
        block_size = self.config.block_size
        if cache is None:
            cache = self.new_cache(idx.size(0), min(idx.size(1) + max_new_tokens, block_size))
        stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # rows that have had a stop token
        for _ in range(max_new_tokens):
            if cache is None or idx.size(1) > block_size:  # no cache (bigram), or the window slides: recompute it
                logits, _ = self(idx[:, -block_size:])  # (B, 1, V)
            else:  # 1) prefill: what the cache lacks of the prompt; 2) decode: the newest token
                cache.length = min(cache.length, idx.size(1) - 1)  # the last token must run, for its logits
                logits, _ = self(idx[:, cache.length :], cache=cache)  # (B, 1, V)
            token = sample_next(logits[:, -1, :vocab_size], temperature, top_k, top_p, generators)
            token = torch.where(stopped, idx[:, -1:], token)  # a finished row repeats its stop token
            yield token
            if stop_tokens:
                stopped = stopped | torch.isin(token, torch.tensor(stop_tokens, device=token.device))
                if stopped.all():
                    return
            idx = torch.cat((idx, token), dim=1)  # (B, T + 1)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return idx (B, T) with a sampled continuation, (B, T + max_new_tokens) at most; the arguments are `stream`'s."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **kwargs)), dim=1)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str, fused: bool = True
    ) -> torch.optim.AdamW:
        """Return AdamW (Loshchilov & Hutter 2019) with weight decay for matrices and embeddings, none for biases and norms."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused and device_type in ("cuda", "cpu"))

    def tie_weights(self) -> None:
        """Re-tie shared weights after loading; a model may have none."""

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache | None:
        """Return an empty KVCache; None for a model without attention."""
        return None

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters, by default without position embeddings; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Return the FLOPs of one token's forward and backward pass."""
        raise NotImplementedError

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, flops_promised: float = 312e12) -> float:
        """Return the model FLOPs utilization (MFU): FLOP/s of training as a share of the device's peak.

        `fwdbwd_per_iter` counts sequences of block_size tokens per iteration, which takes `dt` seconds. `flops_promised` is
        the peak in FLOP/s, by default that of an A100 in bfloat16.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / flops_promised


class GPT(LanguageModel):
    """Decoder-only transformer with learned positions; the output head is tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of these add to the residual stream: scale down (GPT-2)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        loss_rows: int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """With targets, return logits (B, T, V) and the mean loss; without, the last position's logits (B, 1, V) and None.

        `idx` and `targets` are (B, T) int64, T at most block_size. With a `cache`, idx continues the tokens in it and is
        added to it. `loss_rows` is for training: the returned logits are None, which saves memory; with more than that many
        targets, unless it is 0, the loss is computed for that many rows of logits at a time.
        """
        B, T = idx.shape
        position = 0 if cache is None else cache.length
        if position + T > self.config.block_size:
            raise ValueError(f"{position + T} tokens are more than the context of block_size={self.config.block_size}")

        # embed tokens and positions
        positions = torch.arange(position, position + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)

        # the blocks; without targets, the last one computes the last position only
        for layer, block in enumerate(self.transformer.h):
            past = None if cache is None else cache.layers[layer]
            last_only = targets is None and layer + 1 == self.config.n_layer
            x = block(x, past, position, last_only)  # (B, T, C) or (B, 1, C)
        if cache is not None:
            cache.length = position + T
        x = self.transformer.ln_f(x)

        # logits and loss
        if targets is not None and loss_rows is not None and 0 < loss_rows < B * T:
            weight = self.lm_head.weight
            return None, kernels.chunked_cross_entropy(x.view(B * T, -1), weight, targets.reshape(-1), loss_rows)
        logits = self.lm_head(x)  # (B, T, V) or (B, 1, V)
        if targets is None:
            return logits, None
        # as an output of a compiled model, logits would get a gradient: gigabytes of zeros
        return None if loss_rows is not None else logits, self.loss(logits, targets)

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """Return a pretrained model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the Hub id or folder of another GPT-2.

        `override_args` may set `dropout`, which is 0 by default.
        """
        from nanogpt import checkpoint  # here, since checkpoint.py imports this file

        override_args = override_args or {}
        assert override_args.keys() <= {"dropout"}, "only dropout can be overridden: the weights fix the rest"
        model, _, _ = checkpoint.load_model(model_type, out_dir="", **override_args)
        return model

    def tie_weights(self) -> None:
        """Make the token embedding and the output head one matrix (Press & Wolf 2017)."""
        self.transformer.wte.weight = self.lm_head.weight

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        config, weight = self.config, self.transformer.wpe.weight
        shape = (2, batch_size, config.n_head, max_tokens, config.n_embd // config.n_head)
        return KVCache([torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(config.n_layer)])

    def get_num_params(self, non_embedding: bool = True) -> int:
        n_params = super().get_num_params()
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def flops_per_token(self) -> float:
        """6 per parameter but those of positions, plus attention (PaLM: Chowdhery et al. 2022, appendix B)."""
        config = self.config
        return 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * config.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size`, at most the present one, by dropping the later position embeddings."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())


class Bigram(LanguageModel):
    """Bigram model: a table of the next token's logits for each token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: None = None, loss_rows: int | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (logits, loss) as GPT.forward does, for sequences of any length; the loss is never in chunks."""
        if targets is None:
            return self.token_embedding_table(idx[:, [-1]]), None  # (B, 1, V)
        logits = self.token_embedding_table(idx)  # (B, T, V)
        return None if loss_rows is not None else logits, self.loss(logits, targets)

    def flops_per_token(self) -> float:
        """Return 0: a table is looked up, not multiplied."""
        return 0.0

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the sequences that it trains on."""
        self.config.block_size = block_size


def sample_next(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Sample the next token: logits (B, V) -> ids (B, 1) int64.

    `temperature` divides the logits; 0 is greedy decoding. `top_k` keeps the k most likely tokens; of these, `top_p` (nucleus
    sampling, Holtzman et al. 2020) keeps the smallest set with at least that total probability; 0 or None turns either off.
    Row i draws from `generators[i]`, so that its text does not depend on the other rows; by default, all draw from PyTorch's
    generator.
    """
    if temperature < 1e-5:  # greedy; dividing by it could overflow
        return logits.argmax(dim=-1, keepdim=True)
    # The Gumbel-max trick (Gumbel 1954), in place of torch.multinomial: argmax(logits + Gumbel noise) samples from
    # softmax(logits). Each token id has its own noise, so rounding that swaps two ids in top-k rarely changes the sample.
    V = logits.size(-1)
    k, p = min(top_k or V, V), top_p or 1.0
    if generators is None:
        uniform = torch.rand(logits.shape, device=logits.device)  # (B, V)
    else:
        uniform = torch.stack([torch.rand(V, device=logits.device, generator=generator) for generator in generators])
    logits, ids = logits.float() / temperature, None
    if k < V or p < 1.0:
        logits, ids = logits.topk(k)  # (B, k), descending
        uniform = uniform.gather(-1, ids)
    if p < 1.0:
        probs = F.softmax(logits, dim=-1)
        before = probs.cumsum(dim=-1) - probs  # total probability of the more likely tokens; 0 for the first
        logits = logits.masked_fill(before >= p, -math.inf)
    gumbel = -(-uniform.log()).log()
    drawn = (logits + gumbel).argmax(dim=-1, keepdim=True)
    return drawn if ids is None else ids.gather(-1, drawn)
