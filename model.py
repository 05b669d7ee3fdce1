"""The networks: a GPT as GPT-2 and nanoGPT have it, and the bigram model from which one starts.

Both map token ids to logits and a loss:

    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)           # (B, T) ids in, (B, T, vocab_size) logits and the mean loss out
    model.generate(idx, max_new_tokens=100)      # (B, T + 100)

The names of the parameters are GPT-2's, so that state dicts pass between this model, nanoGPT and OpenAI's weights.

References: "Attention Is All You Need" (Vaswani et al. 2017), "Language Models are Unsupervised Multitask Learners" (Radford
et al. 2019).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class LanguageModel(nn.Module):
    """What the GPT and the bigram model share: the loss, sampling, and the optimizer."""

    config: GPTConfig

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in nats, of (B, T, V) logits against (B, T) targets; a target of -1 is left out."""
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)

    def tie_weights(self) -> None:
        """Let parameters that are one be one again, after they were assigned one by one; a model may have none such."""

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue each row of `idx`, (B, T) with T >= 1, by sampling: (B, T + max_new_tokens).

        The model sees the last `block_size` tokens. `vocab_size` is the number of ids that stand for text, where the
        model's own vocabulary is padded; see `sample_next` for the rest.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            idx = torch.cat((idx, sample_next(logits[:, -1, :vocab_size], temperature, top_k, generator)), dim=1)
        return idx

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Return AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings, not biases and norms.

        The two groups are in nanoGPT's order, so that its optimizer states load. The update is one fused kernel on the
        devices that have it.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        assert sum(len(group["params"]) for group in groups) == len(parameters)
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))

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

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and loss: (B, T, vocab_size) with `targets`, else the last position's, (B, 1, vocab_size), and None.

        `idx` and `targets` are (B, T) int64 with T <= block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the context of block_size={self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, self.loss(logits, targets)

    def tie_weights(self) -> None:
        """Let the token embedding and the output head be one matrix (Press & Wolf 2017)."""
        self.transformer.wte.weight = self.lm_head.weight

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

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and loss, as `GPT.forward`; the sequence may have any length."""
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
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return the next token's id, (B, 1) int64, drawn from (B, V) logits.

    A temperature below 1 makes the likely tokens more likely, 0 takes the likeliest; `top_k` leaves only the k likeliest.
    """
    if temperature < 1e-5:  # dividing by it could overflow, and would change nothing
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        values, ids = logits.topk(top_k)  # exactly k, also where several are equally likely
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, values)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)
