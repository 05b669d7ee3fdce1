"""The models against Hugging Face's GPT-2, naive loops and closed forms."""

import io
import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, Bigram, GPTConfig, sample_next

LAYER = [
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
]
NAMES = [
    "transformer.wte.weight",
    "transformer.wpe.weight",
    *[f"transformer.h.0.{name}" for name in LAYER],
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "lm_head.weight",
]
MATRICES = ("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")
SHAPE = {"block_size": 8, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16}


def tiny(model_class: type = GPT, seed: int = 1, **changes) -> GPT | Bigram:
    """Return a small model in eval mode whose every parameter is random and large enough to matter."""
    torch.manual_seed(seed)
    model = model_class(GPTConfig(**SHAPE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def ids(*shape: int, below: int = 13, seed: int = 2) -> torch.Tensor:
    """Return random token ids."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Return the logits of every position."""
    return model(idx, idx)[0].detach()


def greedy(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding by the naive loop: no cache, the whole window again for each token."""
    text = list(prompt)
    for _ in range(max_new_tokens):
        logits = all_logits(model, torch.tensor([text[-model.config.block_size :]]))
        text.append(max(range(logits.size(-1)), key=lambda token: logits[0, -1, token].item()))
    return text


def passes_of(model: GPT) -> list[int]:
    """Return a list that will grow by the number of positions of each forward pass from now on."""
    lengths: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    return lengths


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# forward pass


@pytest.mark.parametrize("ours, theirs", [("tanh", "gelu_new"), ("erf", "gelu")])
def test_matches_hugging_face(ours: str, theirs: str) -> None:
    """Catches a slip in the forward pass: LayerNorms, order of q, k and v, scale, mask, positions, kind of GELU."""
    import transformers

    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 13}
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=8, activation_function=theirs, bos_token_id=0, eos_token_id=0, **shape)
    ).eval()
    model = tiny(gelu=ours, **shape)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D stores its weights as (in, out)
    weights = {name: t.T.contiguous() if name.endswith(transposed) else t for name, t in model.state_dict().items()}
    reference.load_state_dict(weights, strict=True)
    idx = ids(3, 8)
    with torch.no_grad():
        expected = reference(idx, labels=idx)  # it shifts the labels itself
        logits, loss = model(idx, torch.cat((idx[:, 1:], torch.full((3, 1), -1)), dim=1))
    assert expected.logits.std() > 1
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-4)


def test_attention_is_causal() -> None:
    """Catches a mask that shows later tokens to a position, or hides earlier ones from it."""
    model, idx = tiny(), ids(1, 8)
    before = all_logits(model, idx)
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 13
        differs = ((all_logits(model, changed) - before).abs() > 1e-5).any(-1)[0]
        assert differs.tolist() == [position >= t for position in range(8)]


@pytest.mark.parametrize("model_class", [GPT, Bigram])
def test_without_targets_returns_last_logits(model_class: type) -> None:
    """Catches logits of another position, or of a shape that nanoGPT's callers do not expect."""
    model, idx = tiny(model_class), ids(3, 6)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (3, 1, 13)
    torch.testing.assert_close(logits[:, 0], all_logits(model, idx)[:, -1], rtol=0, atol=1e-5)


def test_refuses_too_long_input() -> None:
    """Catches an IndexError from deep inside, or positions that wrap around."""
    with pytest.raises(ValueError, match=r"9 tokens .*block_size=8"):
        tiny()(ids(1, 9))


@pytest.mark.parametrize("part", ["embedding", "attention", "attention output", "mlp"])
def test_dropout_in_training_only(part: str) -> None:
    """Catches a missing dropout, or one that stays on in evaluation and sampling."""
    model, idx = tiny(dropout=0.0), ids(2, 8)
    without = all_logits(model, idx)
    for block in model.transformer.h:
        block.attn.dropout = 0.5 if part == "attention" else 0.0
        block.attn.resid_dropout.p = 0.5 if part == "attention output" else 0.0
        block.mlp.dropout.p = 0.5 if part == "mlp" else 0.0
    model.transformer.drop.p = 0.5 if part == "embedding" else 0.0
    assert torch.equal(all_logits(model, idx), without)
    model.train()
    assert not torch.allclose(all_logits(model, idx), all_logits(model, idx))


def test_dropout_of_config() -> None:
    """Catches a dropout that does not follow the config."""
    model = GPT(GPTConfig(**SHAPE, dropout=0.25))
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts == [0.25] * 5
    assert [block.attn.dropout for block in model.transformer.h] == [0.25] * 2


# loss


@pytest.mark.parametrize("model_class", [GPT, Bigram])
def test_loss_ignores_minus_one(model_class: type) -> None:
    """Catches ignored targets that count in the sum or in the mean's divisor, and NaN if all are ignored."""
    model, idx, targets = tiny(model_class), ids(2, 8), ids(2, 8, seed=3)
    targets[0, :5] = -1
    targets[1, 7] = -1
    logits, loss = model(idx, targets)
    losses = [
        -math.log(F.softmax(logits[b, t].double(), -1)[targets[b, t]].item())
        for b in range(2)
        for t in range(8)
        if targets[b, t] != -1
    ]
    assert len(losses) == 10
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert model(idx, torch.full_like(targets, -1))[1].item() == 0.0


@pytest.mark.parametrize("rows", [1, 5, 16, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_rows_change_no_gradient(rows: int, dtype: torch.dtype) -> None:
    """Catches a chunked loss that gets other rows or targets than the whole one, or logits that are computed anyway."""
    whole, chunked = tiny(), tiny()
    idx, targets = ids(4, 8), ids(4, 8, seed=3)
    targets[0, :5] = targets[2] = -1
    losses = []
    for model, loss_rows in ((whole, 0), (chunked, rows)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss = model(idx, targets, loss_rows=loss_rows)
        (3 * loss).backward()
        losses.append(loss.item())
        assert logits is None
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= tolerance * p.grad.norm(), name


def test_bfloat16_autocast_is_near_float32() -> None:
    """Catches an operation that has no bfloat16, or that loses the loss in it."""
    model, idx, targets = tiny(), ids(4, 8), ids(4, 8, seed=3)
    _, exact = model(idx, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_overfits_one_batch(bias: bool) -> None:
    """Catches parameters without a gradient, or a loss of other targets."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.99), "cpu")
    idx, targets = ids(4, 8), ids(4, 8, seed=3)
    for _ in range(150):
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# parameters


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_names_are_gpt2s(bias: bool) -> None:
    """Catches a renamed or reordered parameter, with which weights and optimizer states no longer pass between programs."""
    names = [name for name in NAMES if bias or not name.endswith("bias")]
    model = tiny(n_layer=1, bias=bias)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names[:-1]  # the tied head counts once


def test_head_is_tied_to_embedding() -> None:
    """Catches two matrices where GPT-2 has one, or a tie that loading weights undoes."""
    model = tiny()
    model.load_state_dict(tiny(seed=5).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_weights() -> None:
    """Catches residual projections without their smaller std, biases that are not 0, norms that are not 1."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=3, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if name.endswith(MATRICES):
            std = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(parameter.mean().item()) < 0.002, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_initial_loss_of_gpt() -> None:
    """Catches initial weights so large that the untrained model prefers some tokens."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    _, loss = model(ids(8, 32, below=65), ids(8, 32, below=65, seed=3))
    assert loss.item() == pytest.approx(math.log(65), abs=0.05)


def test_initial_loss_of_bigram() -> None:
    """Catches another initialization than N(0, 1), whose mean loss over all pairs is about ln(65) + 1/2."""
    torch.manual_seed(1)
    model = Bigram(GPTConfig(block_size=8, vocab_size=65))
    pairs = torch.cartesian_prod(torch.arange(65), torch.arange(65))
    _, loss = model(pairs[:, :1], pairs[:, 1:])
    assert loss.item() == pytest.approx(math.log(65) + 0.5, abs=0.08)


@pytest.mark.parametrize("bias", [True, False])
def test_only_matrices_decay(bias: bool) -> None:
    """Catches a parameter updated never or twice, decayed biases or norms, another order than nanoGPT's."""
    model = tiny(bias=bias)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu")
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, not_decayed = ([name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert decayed == [name for name in name_of.values() if name.endswith(MATRICES)]
    assert not_decayed == [name for name in name_of.values() if not name.endswith(MATRICES)]
    settings = [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups]
    assert settings == [(0.1, 3e-4, (0.8, 0.9)), (0.0, 3e-4, (0.8, 0.9))]


def test_optimizer_of_bigram() -> None:
    """Catches an empty group of parameters that do not decay, or a table that is left out."""
    model = tiny(Bigram)
    (group,) = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu").param_groups
    assert group["params"] == [model.token_embedding_table.weight]


def test_crop_block_size() -> None:
    """Catches the wrong positions cut away, or a checkpoint that still holds the long table."""
    model, idx = tiny(block_size=256), ids(2, 8)
    before = all_logits(model, idx)
    model.crop_block_size(8)
    assert torch.equal(all_logits(model, idx), before)
    assert model.config.block_size == 8
    file = io.BytesIO()
    torch.save({"wpe": model.state_dict()["transformer.wpe.weight"]}, file)
    assert len(file.getvalue()) < 256 * 16 * 4
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert any(p is model.transformer.wpe.weight for group in groups for p in group["params"])
    with pytest.raises(ValueError):
        model(ids(1, 9))


def test_parameter_count_is_gpt2s() -> None:
    """Catches tied weights counted twice, or position embeddings that nanoGPT leaves out."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
        without_bias = GPT(GPTConfig(vocab_size=50257, bias=False))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    assert without_bias.get_num_params() == model.get_num_params() - 12 * (2 * 768 + 3 * 768 + 768 + 4 * 768 + 768) - 768


def test_mfu_follows_palm() -> None:
    """Catches a wrong FLOP count, or a utilization that is off by the context or the peak."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    flops = (6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024) * 1024 * 480  # of 480 sequences
    assert model.estimate_mfu(480, 2.0) == pytest.approx(flops / 2.0 / 312e12, rel=1e-9)
    assert model.estimate_mfu(480, 2.0, flops_promised=1e15) == pytest.approx(flops / 2.0 / 1e15, rel=1e-9)


# generation with the KV cache


@pytest.mark.parametrize("length", [1, 17, 24])
@pytest.mark.parametrize("rows", [1, 4])
def test_cache_changes_no_token(rows: int, length: int) -> None:
    """Catches a cache that shifts, mixes or loses positions, a wrong window past the context, a lost prompt."""
    model, idx = tiny(block_size=24), ids(rows, length)
    text = model.generate(idx, 72, temperature=0)
    assert text.shape == (rows, length + 72) and not text.requires_grad
    assert text.tolist() == [greedy(model, row, 72) for row in idx.tolist()]


def test_long_prompt_counts_with_its_end() -> None:
    """Catches an error, or the prompt's beginning, if it is longer than the context."""
    model, idx = tiny(), ids(2, 12)
    assert model.generate(idx, 20, temperature=0).tolist() == [greedy(model, row, 20) for row in idx.tolist()]


def test_cache_computes_each_token_once() -> None:
    """Catches a cache that is not used, which changes nothing but the time."""
    model = tiny(block_size=24)
    lengths = passes_of(model)
    model.generate(ids(1, 5), 22)
    assert lengths == [5] + [1] * 19 + [24] * 2


def test_cache_lasts_over_turns() -> None:
    """Catches a chat that computes all turns again, or whose new turn does not see the earlier ones."""
    model = tiny(block_size=64)
    lengths, cache = passes_of(model), model.new_cache(1, 64)
    text = ids(1, 5)
    for turn in range(3):
        text = torch.cat((model.generate(text, 4, temperature=0, cache=cache), ids(1, 3, seed=turn)), dim=1)
    assert lengths == [5, 1, 1, 1, 4, 1, 1, 1, 4, 1, 1, 1]
    assert cache.length == text.size(1) - 4  # not yet: the last token drawn, and the three after it
    expected = ids(1, 5).tolist()[0]
    for turn in range(3):
        expected = greedy(model, expected, 4) + ids(1, 3, seed=turn).tolist()[0]
    assert text.tolist() == [expected]


@pytest.mark.parametrize("kept, length", [(7, 9), (7, 7), (20, 7), (0, 7)])
def test_shortened_cache_forgets_the_rest(kept: int, length: int) -> None:
    """Catches a turn that was taken back and still counts, and a prompt that is wholly in the cache and gets no logits."""
    model = tiny(block_size=64)
    cache, text = model.new_cache(1, 64), ids(1, 20)
    model.generate(text, 10, cache=cache)
    cache.length = kept
    other = torch.cat((text[:, :7], ids(1, 2, seed=5)), dim=1)[:, :length]
    assert model.generate(other, 5, temperature=0, cache=cache).tolist() == [greedy(model, other[0].tolist(), 5)]


def test_stop_tokens_end_each_row() -> None:
    """Catches a row that goes on after its stop token or ends the others, and a stop token missing from the text."""
    model = tiny(block_size=64)
    free = model.generate(ids(4, 5), 40, temperature=0)[:, 5:].tolist()
    stop = free[0][6], free[1][3]
    text = model.generate(ids(4, 5), 40, temperature=0, stop_tokens=stop)[:, 5:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stop), 39) for row in free]
    assert len({*ends}) > 1, "this tests nothing: all rows end at once"
    length = max(ends) + 1
    assert text == [row[: end + 1] + [row[end]] * (length - end - 1) for row, end in zip(free, ends, strict=True)]


def test_stream_yields_tokens_at_once() -> None:
    """Catches a stream that is computed to its end before it yields."""
    model = tiny()
    lengths = passes_of(model)
    stream = model.stream(ids(2, 3), 1000)
    first = [next(stream) for _ in range(3)]
    assert [token.shape for token in first] == [(2, 1)] * 3 and len(lengths) == 3


def test_generate_zero_tokens() -> None:
    """Catches an extra token, or an empty text."""
    assert torch.equal(tiny().generate(ids(1, 3), 0), ids(1, 3))


# sampling


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, None), (1.0, 3), (0.7, 2), (1.0, 99)])
def test_samples_follow_softmax(temperature: float, top_k: int | None) -> None:
    """Catches logits multiplied by the temperature, a top_k that shifts or leaks, probabilities not renormalized."""
    logits = [1.0, -0.5, 2.0, 0.3, 0.0]
    weights = [math.exp(value / temperature) for value in logits]
    if top_k is not None:
        weights = [weight if weight in sorted(weights)[-top_k:] else 0.0 for weight in weights]
    draws = 20000
    torch.manual_seed(1)
    drawn = sample_next(torch.tensor(logits).expand(draws, 5), temperature, top_k)
    counts = drawn.flatten().bincount(minlength=5).tolist()
    expected = [draws * weight / sum(weights) for weight in weights]
    assert all(count == 0 for count, number in zip(counts, expected, strict=True) if number == 0)
    chi_square = sum((count - number) ** 2 / number for count, number in zip(counts, expected, strict=True) if number)
    assert chi_square < 23.5  # one seed in ten thousand would exceed it


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 13, 200])
def test_padding_is_never_sampled(temperature: float, top_k: int | None) -> None:
    """Catches a padding row of the embedding drawn as a token, even if it is the likeliest or fills the top k."""
    model = tiny(Bigram)
    with torch.no_grad():
        model.token_embedding_table.weight[:, 10:] += 100
    text = model.generate(ids(8, 1, below=10), 20, temperature=temperature, top_k=top_k, vocab_size=10)
    assert text.max() < 10
    assert model.generate(ids(8, 1, below=10), 20)[:, 1:].min() >= 10


def test_top_k_is_exact_in_a_tie() -> None:
    """Catches a top_k that lets through all tokens that tie with the k-th: with equal logits, every token."""
    torch.manual_seed(1)
    drawn = sample_next(torch.zeros(2000, 50), top_k=3)
    assert drawn.shape == (2000, 1) and drawn.dtype == torch.int64
    assert len(set(drawn.flatten().tolist())) == 3


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (None, 0.5, [2]),
        (None, 0.65, [0, 2]),
        (None, 0.85, [0, 2, 3]),
        (None, 1.0, [0, 1, 2, 3, 4]),
        (2, 0.8, [0, 2]),
        (2, 0.7, [2]),
    ],
)
def test_top_p_keeps_the_smallest_nucleus(top_k: int | None, top_p: float, kept: list[int]) -> None:
    """Catches one token too many or too few, a share of all tokens instead of the top k, an empty nucleus."""
    probs = [0.2, 0.08, 0.55, 0.12, 0.05]
    torch.manual_seed(1)
    drawn = sample_next(torch.tensor(probs).log().expand(20000, 5), top_k=top_k, top_p=top_p).flatten()
    counts = drawn.bincount(minlength=5).tolist()
    total = sum(probs[i] for i in kept)
    assert [i for i in range(5) if counts[i]] == kept
    for i in kept:
        assert counts[i] / 20000 == pytest.approx(probs[i] / total, abs=0.02)


def test_tiny_top_p_is_greedy() -> None:
    """Catches a top_p so small that no token is left."""
    assert sample_next(torch.zeros(50, 7).index_fill(1, torch.tensor([4]), 1e-3), top_p=1e-9).unique().tolist() == [4]


def test_tiny_temperature_is_greedy() -> None:
    """Catches logits that overflow when divided by a temperature just above 0."""
    assert sample_next(torch.tensor([[10.0, 9.0, -3.0]]), temperature=1e-40).tolist() == [[0]]


@pytest.mark.parametrize("top_k", [None, 40])
def test_rounding_rarely_changes_a_draw(top_k: int | None) -> None:
    """Catches noise that belongs to ranks: if two nearly equal logits change places, another token is drawn."""
    torch.manual_seed(1)
    logits = torch.randn(1000, 50).round(decimals=1)  # many ties
    seeds = range(1000)
    drawn = sample_next(logits, top_k=top_k, generators=generators(*seeds))
    again = sample_next(logits + torch.randn(1000, 50) * 1e-6, top_k=top_k, generators=generators(*seeds))
    assert (drawn == again).float().mean() > 0.98


def test_seed_gives_the_same_text_alone_or_in_a_batch() -> None:
    """Catches randomness from elsewhere than the row's generator, or a text that depends on its neighbors."""
    model = tiny()
    idx = ids(1, 4).expand(3, 4)
    options = {"temperature": 0.9, "top_k": 9}
    batch = model.generate(idx, 40, generators=generators(7, 8, 7), **options).tolist()
    torch.rand(5)
    assert batch[0] == batch[2] != batch[1]
    for row, seed in enumerate((7, 8)):
        assert model.generate(idx[:1], 40, generators=generators(seed), **options).tolist() == [batch[row]]


def test_manual_seed_gives_the_same_text() -> None:
    """Catches nanoGPT's way to repeat a text, torch.manual_seed, without effect."""
    model, texts = tiny(), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(ids(2, 4), 30).tolist())
    assert texts[0] == texts[2] != texts[1]
    assert texts[0][0] != texts[0][1]
