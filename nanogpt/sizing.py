"""What a GPT of a given shape costs: parameters, FLOPs and memory by part, and the time to train it. Nothing is run."""

import torch

from model import GPT, GPTConfig

PARTS = {  # part of a parameter's name -> part of the model
    "wte": "token embedding and head",  # one matrix
    "wpe": "position embedding",
    "attn.c_attn": "attention: q, k, v",
    "attn.c_proj": "attention: projection",
    "mlp.c_fc": "MLP: expansion",
    "mlp.c_proj": "MLP: projection",
    "ln_": "LayerNorms",
}
FLOPS_PER_PARAMETER_AND_TOKEN = 6  # of training, about: 6ND (Kaplan et al. 2020)
TOKENS_PER_PARAMETER = 20  # compute-optimal, about (Hoffmann et al. 2022)
ADAMW_BYTES = 8  # per parameter: two moments in float32
SECONDS_PER_DAY = 86_400


def empty_model(shape: GPTConfig) -> GPT:
    """Return a GPT without weights, on the "meta" device, which takes no memory."""
    with torch.device("meta"):
        return GPT(shape)


def parameters(model: GPT, weights_only: bool = False) -> dict[str, int]:
    """Count the parameters by part; `weights_only` leaves out biases and the gains of LayerNorms."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in model.named_parameters():
        (part,) = (part for key, part in PARTS.items() if key in name)
        counts[part] += 0 if weights_only and parameter.dim() < 2 else parameter.numel()
    return counts


def forward_flops(model: GPT) -> dict[str, int]:
    """Count the FLOPs of a forward pass over one sequence of block_size tokens, by part. A backward pass takes twice that.

    Multiplying an (a, b) by a (b, c) matrix takes 2abc FLOPs: 2 per weight and token. LayerNorm, softmax and GELU, which are
    not matrix products, are left out, and attention counts as if it had no mask, as in PaLM's formula (flops_per_token).
    """
    shape, weights = model.config, parameters(model, weights_only=True)
    T = shape.block_size
    products = {part: 2 * T * weights[part] for part in PARTS.values() if part.startswith(("attention", "MLP"))}
    scores = {f"attention: {part}": 2 * T * T * shape.n_embd * shape.n_layer for part in ("scores", "sum of values")}
    head = {"head": 2 * T * weights["token embedding and head"]}  # the embedding itself is looked up, not multiplied
    return scores | products | head


def memory(model: GPT, batch_size: int, loss_rows: int) -> dict[str, int]:
    """Estimate the bytes that training takes, by use, with AdamW and batches of `batch_size` sequences of block_size tokens.

    `loss_rows` are the rows per chunk of the cross-entropy loss; 0: no chunks.
    """
    shape, count = model.config, model.get_num_params(non_embedding=False)
    rows = batch_size * shape.block_size
    sizes = {"weights, float32": 4 * count, "gradients": 4 * count, "AdamW's two moments": ADAMW_BYTES * count}
    sizes["activations, 16 bits, about"] = 34 * rows * shape.n_embd * shape.n_layer
    sizes["logits, float32, all at once"] = 4 * rows * shape.vocab_size
    if loss_rows:
        sizes[f"logits, {loss_rows} rows at a time"] = 4 * loss_rows * shape.vocab_size
    return sizes | {"checkpoint": (4 + ADAMW_BYTES) * count}


def training_days(flops: float, peak: float, mfu: float, gpus: int) -> float:
    """Return the days that `flops` take on `gpus` devices of `peak` FLOP/s each, at a model FLOPs utilization of `mfu`."""
    return flops / (gpus * peak * mfu) / SECONDS_PER_DAY


def report(
    name: str, shape: GPTConfig, batch_size: int, loss_rows: int, tokens: float, peak: float, mfu: float, gpus: int
) -> dict[str, float]:
    """Print all of the above; return the main figures. 0 `tokens` are the compute-optimal number."""
    model, T = empty_model(shape), shape.block_size
    counts, flops, sizes = parameters(model), forward_flops(model), memory(model, batch_size, loss_rows)
    total, forward, flops_per_token = sum(counts.values()), sum(flops.values()), model.flops_per_token()
    print(f"{name}: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, context {T:,}")

    # parameters and FLOPs
    print("parameters")
    _print_shares(counts)
    print(f"FLOPs of a forward pass over {T:,} tokens")
    _print_shares(flops)
    print(f"  {'forward and backward':26} {3 * forward:>22,}")
    print(f"  {'by 6N + 12LHQT, as in MFU':26} {flops_per_token * T:>22,.0f}  ratio {flops_per_token * T / (3 * forward):.4f}")

    # memory and time
    print(f"memory of training on batches of {batch_size} x {T}")
    for use, size in sizes.items():
        print(f"  {use:29} {size / 1e6:>12,.1f} MB")
    source = "" if tokens else f" ({TOKENS_PER_PARAMETER} per parameter, compute-optimal: Hoffmann et al. 2022)"
    tokens = tokens or TOKENS_PER_PARAMETER * total
    by_6ND = training_days(FLOPS_PER_PARAMETER_AND_TOKEN * total * tokens, peak, mfu, gpus)
    days = training_days(flops_per_token * tokens, peak, mfu, gpus)
    print(f"time for {tokens / 1e6:,.1f} million tokens{source}, on {gpus} x {peak / 1e12:,.0f} TFLOP/s at an MFU of {mfu:.0%}")
    print(f"  {by_6ND:,.3g} days by 6ND, {days:,.3g} days with attention")
    found = {"parameters": total, "forward_flops": forward, "flops_per_token": flops_per_token}
    found |= {"checkpoint_bytes": sizes["checkpoint"], "optimal_tokens": TOKENS_PER_PARAMETER * total}
    return found | {"days_by_6ND": float(f"{by_6ND:.4g}"), "days": float(f"{days:.4g}")}


def _print_shares(counts: dict[str, int]) -> None:
    """Print a count and its share for each part, and the total."""
    total = sum(counts.values())
    for part, count in counts.items():
        print(f"  {part:26} {count:>22,}  {count / total:6.2%}")
    print(f"  {'total':26} {total:>22,}")
