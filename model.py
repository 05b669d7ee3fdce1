"""The networks: a GPT as GPT-2 and nanoGPT have it, and the bigram model from which one starts.

Both map token ids to logits and a loss:

    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)           # (B, T) ids in, (B, T, vocab_size) logits and the mean loss out
    model.generate(idx, max_new_tokens=100)      # (B, T + 100)
    for token in model.stream(idx, 100): ...     # (B, 1) as each is drawn

The names of the parameters are GPT-2's, so that state dicts pass between this model, nanoGPT and OpenAI's weights.

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

from nanogpt.optim import Muon, MuonWithAdamW

SHORT = 512  # tokens up to which a CPU does without flash attention: quicker, but its memory grows with their square


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2's 124M."""

    block_size: int = 1024  # the context: the most tokens that the model looks back on
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # whether Linear and LayerNorm layers have biases, as GPT-2's do
    gelu: Literal["erf", "tanh"] = "erf"  # the exact GELU, or the approximation that OpenAI's weights were trained with


@dataclass
class KVCache:
    """The keys and values of the tokens that a model has seen so far, so that each is computed once."""

    layers: torch.Tensor  # (n_layer, 2, B, nh, room, hs), in the format that the model computes in
    length: int = 0  # tokens seen; what lies beyond is not read. Lowering it takes back the latest tokens


class CausalSelfAttention(nn.Module):
    """Each position gathers from the positions up to its own what its query finds in their keys, in n_head ways at once."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_head must divide n_embd"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, start: int = 0, last_only: bool = False
    ) -> torch.Tensor:
        """Return (B, T, C) for the T positions of `x`, or (B, 1, C) for the last of them.

        `past` is this layer's part of a cache, (2, B, nh, room, hs), which holds the `start` positions before `x` and takes
        up those of `x`.
        """
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = heads  # (B, nh, T, hs) each
        if past is not None:
            past[:, :, :, start : start + T] = heads[1:]
            k, v = past[:, :, :, : start + T]  # (B, nh, start + T, hs) each
        if last_only:
            q = q[:, :, -1:]
        mask = None
        if start > 0 and q.size(2) > 1:  # query i stands at position start + i
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and q.size(2) > 1  # a query alone is the last position, which sees all
        dtype = q.dtype
        if dtype == torch.bfloat16 and q.device.type == "cpu" and is_causal and T <= SHORT:
            y = explicit_attention(heads, dropout)
        elif dtype != torch.float32 and q.device.type == "cpu":  # flash attention in 16 bits is slow there
            with torch.autocast("cpu", enabled=False):
                q, k, v = q.float(), k.float(), v.float()
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        y = y.to(dtype).transpose(1, 2).reshape(B, -1, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def explicit_attention(heads: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return what causal `scaled_dot_product_attention` makes of queries, keys and values, which are `heads`,
    (3, B, nh, T, hs): (B, nh, T, hs), with all scores in memory at once.

    On a CPU in bfloat16, up to SHORT tokens, its plain matrix products are two to three times as fast.
    """
    _, B, nh, T, hs = heads.shape
    with torch.autocast("cpu", enabled=False):  # which would have the softmax in float32
        q, k, v = heads.reshape(3, B * nh, T, hs)
        later = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        scores = torch.baddbmm(later, q, k.mT, alpha=1 / math.sqrt(hs))  # (B * nh, T, T)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout)
        return torch.bmm(weights, v).view(B, nh, T, hs)


class MLP(nn.Module):
    """What each position makes of what it has gathered: up to four times the width, GELU, and down again."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normalised stream and added back to it (pre-LayerNorm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, start: int = 0, last_only: bool = False
    ) -> torch.Tensor:
        """Return (B, T, C), or (B, 1, C) for the last position alone; see `CausalSelfAttention.forward`."""
        attended = self.attn(self.ln_1(x), past, start, last_only)
        x = (x[:, -1:] if last_only else x) + attended
        return x + self.mlp(self.ln_2(x))


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of a linear layer's outputs, of which only some rows are in memory at a time.

    The gradients are computed with the loss, while the rows are there, so that nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the sum for x (N, C), weight (V, C) and targets (N,), in chunks of `rows`; a target of -1 is left out."""
        total = torch.zeros((), device=x.device)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if wanted:
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, len(x), rows):
            part, target = x[i : i + rows], targets[i : i + rows]
            logits = part @ weight.T  # (rows, V)
            dtype = logits.dtype  # that of autocast, where it is on
            error = F.log_softmax(logits.float(), dim=-1)
            del logits
            total += F.nll_loss(error, target, ignore_index=-1, reduction="sum")
            if wanted:
                error.exp_()  # the gradient of the logits: probabilities, less 1 at the target
                error.scatter_add_(1, target.clamp(min=0)[:, None], torch.full_like(error[:, :1], -1.0))
                error *= (target != -1)[:, None]
                error = error.to(dtype)
                dx[i : i + rows] = error @ weight
                dweight += error.T @ part
            del error  # before the next chunk needs as much
        if wanted:
            ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        dx, dweight = ctx.saved_tensors
        return dx.mul_(gradient), dweight.mul_(gradient), None, None


class LanguageModel(nn.Module):
    """What the GPT and the bigram model share: the loss, sampling, and the optimizer."""

    config: GPTConfig

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in nats, of (B, T, V) logits against (B, T) targets; a target of -1 is left out.

        Where all are left out, as in a batch of nothing but a person's words in a chat, it is 0.
        """
        total = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1, reduction="sum")
        return total / (targets != -1).sum().clamp(min=1)

    def tie_weights(self) -> None:
        """Let parameters that are one be one again, after they were assigned one by one; a model may have none such."""

    def new_cache(self, batch_size: int, room: int) -> KVCache | None:
        """Return an empty cache for sequences of up to `room` tokens; None for a model that looks back on nothing."""
        return None

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
        """Continue each row of `idx`, (B, T) with T >= 1, by sampling: yield the next tokens, (B, 1) int64, one by one.

        The model sees the last `block_size` tokens, their positions counted from zero. Up to that length, each token's keys
        and values are computed once; beyond it every position changes with every token, and the window is computed anew.

        Ends after `max_new_tokens`, or once every row has had one of `stop_tokens`; a row that has repeats it until then.
        `vocab_size` is the number of ids that stand for text, where the model's own vocabulary is padded. A `cache` holds
        the keys and values of the first `cache.length` tokens of `idx`, and afterwards those of all but the last token,
        as far as there is room. For the rest see `sample_next`.
        """
        block_size = self.config.block_size
        if cache is None:
            cache = self.new_cache(idx.size(0), min(idx.size(1) + max_new_tokens, block_size))
        token, stopped = idx[:, -1:], torch.zeros_like(idx[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            if cache is None or idx.size(1) > block_size:
                logits, _ = self(idx[:, -block_size:])
            else:
                cache.length = min(cache.length, idx.size(1) - 1)  # the last token's logits are wanted in any case
                logits, _ = self(idx[:, cache.length :], cache=cache)
            drawn = sample_next(logits[:, -1, :vocab_size], temperature, top_k, top_p, generators)
            token = torch.where(stopped, token, drawn)
            yield token
            if stop_tokens:
                stopped = stopped | torch.isin(token, torch.tensor(stop_tokens, device=token.device))
                if stopped.all():
                    return
            idx = torch.cat((idx, token), dim=1)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return `idx` with what `stream`, which takes the same arguments, adds to it: (B, T + max_new_tokens) at most."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **kwargs)), dim=1)

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str,
        muon: bool = False,
        fused: bool = True,
    ) -> torch.optim.AdamW | MuonWithAdamW:
        """Return AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings, not biases and norms.

        Its two groups are in nanoGPT's order, so that its optimizer states load. `fused` makes the update one kernel on the
        devices that have it. With `muon`, the matrices of the hidden layers are Muon's, at the same learning rate.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = {p for p in self.hidden_matrices() if p.requires_grad} if muon else set()
        rest = [p for p in parameters if p not in hidden]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        assert sum(len(group["params"]) for group in groups) + len(hidden) == len(parameters)
        groups = [group for group in groups if group["params"]]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused and device_type in ("cuda", "cpu"))
        if not hidden:
            return adamw
        matrices = [p for p in parameters if p in hidden]
        return MuonWithAdamW(Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"), adamw)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Return the matrices of the hidden layers, which map a layer's channels to channels: none for a model without."""
        return []

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters, position embeddings left out by default; tied token embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, flops_promised: float = 312e12) -> float:
        """Return the model FLOPs utilisation: the share of `flops_promised` that training reaches.

        `fwdbwd_per_iter` is the number of sequences of `block_size` tokens in an iteration of `dt` seconds;
        `flops_promised` is the peak in FLOP/s, by default that of an A100 in bfloat16. FLOPs per token are 6N + 12LHQT, as
        in PaLM (Chowdhery et al. 2022, appendix B).
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / flops_promised

    def flops_per_token(self) -> float:
        """Return the FLOPs of a forward and backward pass, per token."""
        raise NotImplementedError


class GPT(LanguageModel):
    """A decoder-only Transformer with learned positions and the token embedding tied to the output head."""

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
            if name.endswith("c_proj.weight"):  # each layer adds to the stream twice: keep its variance near one
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """Return the model with the weights that `model_type` names: gpt2, gpt2-medium, gpt2-large, gpt2-xl, and whatever
        else train.py's init_from takes. `override_args` may set the dropout, which is 0 otherwise.
        """
        from nanogpt import checkpoint  # the rooms that read files stand on this one

        override_args = override_args or {}
        assert override_args.keys() <= {"dropout"}, "the rest of the shape is that of the weights"
        model, _, _ = checkpoint.load_model(model_type, out_dir="", **override_args)
        return model

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        loss_rows: int = 0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return logits and loss: (B, T, vocab_size) with `targets`, else the last position's, (B, 1, vocab_size), and None.

        `idx` and `targets` are (B, T) int64. With a `cache`, `idx` stands behind the tokens that it holds, and is then held
        too. In all that is block_size tokens at most. With `loss_rows`, the logits of only so many positions are in memory
        at a time, and None is returned in their place; the loss is the same.
        """
        B, T = idx.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens are more than the context of block_size={self.config.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            past = None if cache is None else cache.layers[layer]
            last_only = targets is None and layer + 1 == self.config.n_layer  # no one looks at the others' output
            x = block(x, past, start, last_only)  # (B, T, C), or (B, 1, C)
        if cache is not None:
            cache.length = start + T
        x = self.transformer.ln_f(x)
        if targets is not None and 0 < loss_rows < B * T:
            return None, self.chunked_loss(x.view(B * T, -1), targets.reshape(-1), loss_rows)
        logits = self.lm_head(x)  # (B, T or 1, vocab_size)
        return logits, None if targets is None else self.loss(logits, targets)

    def chunked_loss(self, x: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        """Return what `loss` does, for (N, C) inputs of the output head and (N,) targets."""
        total = ChunkedCrossEntropy.apply(x, self.lm_head.weight, targets, rows)
        return total / (targets != -1).sum().clamp(min=1)

    def new_cache(self, batch_size: int, room: int) -> KVCache:
        config, like = self.config, self.transformer.wpe.weight
        shape = (config.n_layer, 2, batch_size, config.n_head, room, config.n_embd // config.n_head)
        return KVCache(torch.empty(shape, dtype=like.dtype, device=like.device))

    def tie_weights(self) -> None:
        """Let the token embedding and the output head be one matrix (Press & Wolf 2017)."""
        self.transformer.wte.weight = self.lm_head.weight

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for p in self.transformer.h.parameters() if p.dim() == 2]

    def get_num_params(self, non_embedding: bool = True) -> int:
        n_params = super().get_num_params()
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def flops_per_token(self) -> float:
        config = self.config
        return 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * config.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size`, which must not be above the present one: the later positions go."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())


class Bigram(LanguageModel):
    """A table of the next token's logits for each token: what a GPT falls back to without attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)  # N(0, 1), PyTorch's default

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: None = None, loss_rows: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and loss, as `GPT.forward`, but all logits in any case; the sequence may have any length."""
        if targets is None:
            return self.token_embedding_table(idx[:, [-1]]), None  # (B, 1, V)
        logits = self.token_embedding_table(idx)  # (B, T, V)
        return logits, self.loss(logits, targets)

    def flops_per_token(self) -> float:
        return 0.0  # it looks up and multiplies nothing

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the windows that it is trained on."""
        self.config.block_size = block_size


def sample_next(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Return the next token's id, (B, 1) int64, drawn from (B, V) logits.

    A temperature below 1 makes the likely tokens more likely, 0 takes the likeliest. `top_k` leaves exactly the k likeliest;
    of these, `top_p` leaves the fewest likely ones that make up that share of the probability (Holtzman et al. 2020). Row i
    draws from `generators[i]`, so that its tokens do not depend on the other rows; without, from PyTorch's own generator.
    """
    if temperature < 1e-5:  # dividing by it could overflow, and would change nothing
        return logits.argmax(dim=-1, keepdim=True)
    # The largest sum of a logit and Gumbel noise is drawn from the softmax (Gumbel 1954). The noise belongs to a token, not
    # to its rank, so that rounding in the logits, as between batches of different sizes, hardly ever changes what is drawn.
    V = logits.size(-1)
    if generators is None:
        uniform = torch.rand(logits.shape, device=logits.device)  # (B, V)
    else:
        uniform = torch.stack([torch.rand(V, device=logits.device, generator=generator) for generator in generators])
    logits, ids = logits.float() / temperature, None
    if (top_k or V) < V or (top_p or 1.0) < 1.0:
        logits, ids = logits.topk(min(top_k or V, V))  # (B, k), falling
        uniform = uniform.gather(-1, ids)
    if (top_p or 1.0) < 1.0:
        probs = F.softmax(logits, dim=-1)
        likelier = probs.cumsum(dim=-1) - probs  # the share of those before; nothing for the first
        logits = logits.masked_fill(likelier >= top_p, -math.inf)
    drawn = (logits - (-uniform.log()).log()).argmax(dim=-1, keepdim=True)
    return drawn if ids is None else ids.gather(-1, drawn)
