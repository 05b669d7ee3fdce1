"""The networks against Hugging Face's GPT-2, naive loops and closed forms."""

import io
import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, Bigram, GPTConfig, sample_next
from nanogpt.kernels import FLASH_MIN_TOKENS, explicit_attention

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


def tiny(model_class: type = GPT, seed: int = 1, **changes) -> GPT | Bigram:
    """A small model whose every parameter is random and large enough to matter."""
    torch.manual_seed(seed)
    model = model_class(GPTConfig(**{"block_size": 8, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def ids(*shape: int, below: int = 13, seed: int = 2) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    return model(idx, idx)[0].detach()


@pytest.mark.parametrize("ours, theirs", [("tanh", "gelu_new"), ("erf", "gelu")])
def test_logits_and_loss_are_hugging_faces(ours, theirs):
    """A slip anywhere in the forward pass: norms, order of q, k and v, scale, mask, positions, kind of GELU."""
    import transformers

    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 13}
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=8, activation_function=theirs, bos_token_id=0, eos_token_id=0, **shape)
    ).eval()
    model = tiny(gelu=ours, **shape)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D keeps its matrices as (in, out)
    weights = {name: t.T.contiguous() if name.endswith(transposed) else t for name, t in model.state_dict().items()}
    reference.load_state_dict(weights, strict=True)
    idx = ids(3, 8)
    with torch.no_grad():
        expected = reference(idx, labels=idx)  # it shifts the labels by one itself
        logits, loss = model(idx, torch.cat((idx[:, 1:], torch.full((3, 1), -1)), dim=1))
    assert expected.logits.std() > 1
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_gpt2s_names_in_nanogpts_order(bias):
    """A renamed or reordered parameter, with which weights and optimizer states no longer pass between programs."""
    names = [name for name in NAMES if bias or not name.endswith("bias")]
    model = tiny(n_layer=1, bias=bias)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names[:-1]  # the tied head counts once


def test_head_is_tied_to_the_embedding():
    """Two matrices where GPT-2 has one, or a tie that loading weights undoes."""
    model = tiny()
    model.load_state_dict(tiny(seed=5).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_attention_is_causal():
    """A mask that lets a position see later tokens, or hides earlier ones from it."""
    model, idx = tiny(), ids(1, 8)
    before = all_logits(model, idx)
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 13
        differs = ((all_logits(model, changed) - before).abs() > 1e-5).any(-1)[0]
        assert differs.tolist() == [position >= t for position in range(8)]


def test_initial_loss_of_a_gpt_is_that_of_a_uniform_guess():
    """Initial weights so large that the untrained model is sure of something."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    _, loss = model(ids(8, 32, below=65), ids(8, 32, below=65, seed=3))
    assert loss.item() == pytest.approx(math.log(65), abs=0.05)


def test_initial_loss_of_a_bigram_is_that_of_normal_logits():
    """Another initialisation than N(0, 1), whose mean loss over all pairs is about ln(65) + 1/2."""
    torch.manual_seed(1)
    model = Bigram(GPTConfig(block_size=8, vocab_size=65))
    pairs = torch.cartesian_prod(torch.arange(65), torch.arange(65))
    _, loss = model(pairs[:, :1], pairs[:, 1:])
    assert loss.item() == pytest.approx(math.log(65) + 0.5, abs=0.08)


def test_initial_weights():
    """Residual projections without their smaller scale, biases that are not zero, norms that are not one."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=3, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if name.endswith(MATRICES):
            std = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(parameter.mean().item()) < 0.002, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("bias", [True, False])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(bias):
    """A parameter that is never updated or updated twice, decayed biases or norms, another order than nanoGPT's."""
    model = tiny(bias=bias)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu")
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ([name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert decayed == [name for name in name_of.values() if name.endswith(MATRICES)]
    assert kept == [name for name in name_of.values() if not name.endswith(MATRICES)]
    settings = [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups]
    assert settings == [(0.1, 3e-4, (0.8, 0.9)), (0.0, 3e-4, (0.8, 0.9))]


def test_optimizer_of_a_bigram():
    """An empty group of parameters that do not decay, or a table that is left out."""
    model = tiny(Bigram)
    (group,) = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu").param_groups
    assert group["params"] == [model.token_embedding_table.weight]


@pytest.mark.parametrize("model_class", [GPT, Bigram])
def test_targets_of_minus_one_are_left_out(model_class):
    """Masked targets that count in the sum, or in the number that it is divided by; nan where there are no others."""
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


@pytest.mark.parametrize("model_class", [GPT, Bigram])
def test_without_targets_it_returns_the_last_positions_logits(model_class):
    """Logits of the wrong position, or of a shape that nanoGPT's callers do not expect."""
    model, idx = tiny(model_class), ids(3, 6)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (3, 1, 13)
    torch.testing.assert_close(logits[:, 0], all_logits(model, idx)[:, -1], rtol=0, atol=1e-5)


def test_too_long_input_is_refused():
    """An IndexError from deep inside, or positions that wrap around."""
    with pytest.raises(ValueError, match=r"9 tokens .*block_size=8"):
        tiny()(ids(1, 9))


def test_crop_block_size_keeps_the_outputs_and_frees_the_rest():
    """The wrong positions cut away, or the long table still lying under the short one in every checkpoint."""
    model, idx = tiny(block_size=256), ids(2, 8)
    before = all_logits(model, idx)
    model.crop_block_size(8)
    assert torch.equal(all_logits(model, idx), before)
    assert model.config.block_size == 8
    file = io.BytesIO()
    torch.save({"wpe": model.state_dict()["transformer.wpe.weight"]}, file)
    assert len(file.getvalue()) < 256 * 16 * 4
    parameters = [
        p for group in model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups for p in group["params"]
    ]
    assert any(p is model.transformer.wpe.weight for p in parameters)
    with pytest.raises(ValueError):
        model(ids(1, 9))


def test_number_of_parameters_is_gpt2s():
    """Tied weights counted twice, or position embeddings counted where nanoGPT leaves them out."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
        without_bias = GPT(GPTConfig(vocab_size=50257, bias=False))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    assert without_bias.get_num_params() == model.get_num_params() - 12 * (2 * 768 + 3 * 768 + 768 + 4 * 768 + 768) - 768


def test_mfu_is_that_of_the_palm_formula():
    """A wrong FLOP count, or a utilisation that is off by the context or the peak."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    flops = (6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024) * 1024 * 480  # of 480 sequences
    assert model.estimate_mfu(480, 2.0) == pytest.approx(flops / 2.0 / 312e12, rel=1e-9)
    assert model.estimate_mfu(480, 2.0, flops_promised=1e15) == pytest.approx(flops / 2.0 / 1e15, rel=1e-9)


@pytest.mark.parametrize("place", ["embedding", "attention", "attention's output", "mlp"])
def test_dropout_is_active_in_training_only(place):
    """A dropout that was forgotten, or one that also disturbs evaluation and sampling."""
    model, idx = tiny(dropout=0.0), ids(2, 8)
    without = all_logits(model, idx)
    for block in model.transformer.h:
        block.attn.dropout = 0.5 if place == "attention" else 0.0
        block.attn.resid_dropout.p = 0.5 if place == "attention's output" else 0.0
        block.mlp.dropout.p = 0.5 if place == "mlp" else 0.0
    model.transformer.drop.p = 0.5 if place == "embedding" else 0.0
    assert torch.equal(all_logits(model, idx), without)
    model.train()
    assert not torch.allclose(all_logits(model, idx), all_logits(model, idx))


def test_dropout_of_the_config_reaches_every_place():
    """A place that does not follow the config's dropout."""
    model = GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16, dropout=0.25))
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts == [0.25] * 5
    assert [block.attn.dropout for block in model.transformer.h] == [0.25] * 2


def greedy(model: GPT, prompt: list[int], length: int) -> list[int]:
    """What a reader would write: the likeliest token after the last block_size ones, again and again."""
    text = list(prompt)
    for _ in range(length):
        logits = all_logits(model, torch.tensor([text[-model.config.block_size :]]))
        text.append(max(range(logits.size(-1)), key=lambda token: logits[0, -1, token].item()))
    return text


@pytest.mark.parametrize("length", [1, 17, 24])
@pytest.mark.parametrize("rows", [1, 4])
def test_cached_text_is_that_of_recomputation(rows, length):
    """A cache that shifts, mixes or loses positions; a window of another size past the context; a prompt that gets lost."""
    model, idx = tiny(block_size=24), ids(rows, length)
    text = model.generate(idx, 72, temperature=0)
    assert text.shape == (rows, length + 72) and not text.requires_grad
    assert text.tolist() == [greedy(model, row, 72) for row in idx.tolist()]


def test_a_prompt_longer_than_the_context_counts_with_its_end():
    """An error, or the beginning of the prompt, for whoever gives more than the model can see."""
    model, idx = tiny(), ids(2, 12)
    assert model.generate(idx, 20, temperature=0).tolist() == [greedy(model, row, 20) for row in idx.tolist()]


def seen_by(model: GPT) -> list[int]:
    """A list that grows by the number of positions in each pass through the model from now on."""
    lengths: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    return lengths


def test_each_token_is_computed_once_up_to_the_context():
    """A cache that is not used, which changes nothing but the time."""
    model = tiny(block_size=24)
    lengths = seen_by(model)
    model.generate(ids(1, 5), 22)
    assert lengths == [5] + [1] * 19 + [24] * 2


def test_a_cache_that_is_kept_takes_only_what_is_new():
    """A conversation that is computed again for each turn, or whose new turn does not see the ones before it."""
    model = tiny(block_size=64)
    lengths, cache = seen_by(model), model.new_cache(1, 64)
    text = ids(1, 5)
    for turn in range(3):
        text = torch.cat((model.generate(text, 4, temperature=0, cache=cache), ids(1, 3, seed=turn)), dim=1)
    assert lengths == [5, 1, 1, 1, 4, 1, 1, 1, 4, 1, 1, 1]
    assert cache.length == text.size(1) - 4  # the last token drawn and the three after it are yet to be seen
    expected = ids(1, 5).tolist()[0]
    for turn in range(3):
        expected = greedy(model, expected, 4) + ids(1, 3, seed=turn).tolist()[0]
    assert text.tolist() == [expected]


@pytest.mark.parametrize("kept, length", [(7, 9), (7, 7), (20, 7), (0, 7)])
def test_a_cache_that_is_shortened_forgets_the_rest(kept, length):
    """A turn that was taken back and still has its say; a text that the cache holds to its end and so gives no logits."""
    model = tiny(block_size=64)
    cache, text = model.new_cache(1, 64), ids(1, 20)
    model.generate(text, 10, cache=cache)
    cache.length = kept
    other = torch.cat((text[:, :7], ids(1, 2, seed=5)), dim=1)[:, :length]
    assert model.generate(other, 5, temperature=0, cache=cache).tolist() == [greedy(model, other[0].tolist(), 5)]


def test_stop_tokens_end_each_row_and_then_the_text():
    """A row that goes on behind its end, ends the others, or an end that is taken for no part of the text."""
    model = tiny(block_size=64)
    free = model.generate(ids(4, 5), 40, temperature=0)[:, 5:].tolist()
    stop = free[0][6], free[1][3]
    text = model.generate(ids(4, 5), 40, temperature=0, stop_tokens=stop)[:, 5:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stop), 39) for row in free]
    assert len({*ends}) > 1, "a test of nothing: all rows end at once"
    length = max(ends) + 1
    assert text == [row[: end + 1] + [row[end]] * (length - end - 1) for row, end in zip(free, ends, strict=True)]


def test_tokens_come_as_they_are_drawn():
    """A stream that is computed to its end before it begins."""
    model = tiny()
    lengths = seen_by(model)
    stream = model.stream(ids(2, 3), 1000)
    first = [next(stream) for _ in range(3)]
    assert [token.shape for token in first] == [(2, 1)] * 3 and len(lengths) == 3


def test_generating_nothing_returns_the_prompt():
    """An extra token, or an empty text."""
    assert torch.equal(tiny().generate(ids(1, 3), 0), ids(1, 3))


def test_top_k_is_exact_where_tokens_are_equally_likely():
    """All tokens that tie with the k-th let through, and with equal logits that is all of them."""
    torch.manual_seed(1)
    drawn = sample_next(torch.zeros(2000, 50), top_k=3)
    assert drawn.shape == (2000, 1) and drawn.dtype == torch.int64
    assert len(set(drawn.flatten().tolist())) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 13, 200])
def test_ids_beyond_the_vocabulary_are_never_sampled(temperature, top_k):
    """Padding rows of the embedding drawn as tokens, also when they are the likeliest or fill the top k."""
    model = tiny(Bigram)
    with torch.no_grad():
        model.token_embedding_table.weight[:, 10:] += 100
    text = model.generate(ids(8, 1, below=10), 20, temperature=temperature, top_k=top_k, vocab_size=10)
    assert text.max() < 10
    assert model.generate(ids(8, 1, below=10), 20)[:, 1:].min() >= 10


def sources(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_seed_gives_the_same_text_again_alone_or_in_a_batch():
    """Randomness from elsewhere than the row's generator, or a text that depends on its neighbours."""
    model = tiny()
    idx = ids(1, 4).expand(3, 4)
    options = {"temperature": 0.9, "top_k": 9}
    batch = model.generate(idx, 40, generators=sources(7, 8, 7), **options).tolist()
    torch.rand(5)
    assert batch[0] == batch[2] != batch[1]
    for row, seed in enumerate((7, 8)):
        assert model.generate(idx[:1], 40, generators=sources(seed), **options).tolist() == [batch[row]]


def test_without_generators_pytorchs_seed_counts():
    """nanoGPT's way to the same text again, torch.manual_seed, that has no effect here."""
    model, texts = tiny(), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(ids(2, 4), 30).tolist())
    assert texts[0] == texts[2] != texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, None), (1.0, 3), (0.7, 2), (1.0, 99)])
def test_sampled_frequencies_are_the_softmaxs(temperature, top_k):
    """Logits multiplied by the temperature, a top_k that shifts or leaks, probabilities that are not renormalised."""
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


@pytest.mark.parametrize(
    "top_k, top_p, left",
    [
        (None, 0.5, [2]),
        (None, 0.65, [0, 2]),
        (None, 0.85, [0, 2, 3]),
        (None, 1.0, [0, 1, 2, 3, 4]),
        (2, 0.8, [0, 2]),
        (2, 0.7, [2]),
    ],
)
def test_top_p_leaves_the_fewest_tokens_that_make_up_the_share(top_k, top_p, left):
    """One token too many or too few; a share of all where top_k has taken some away; none left at all."""
    probs = [0.2, 0.08, 0.55, 0.12, 0.05]
    torch.manual_seed(1)
    drawn = sample_next(torch.tensor(probs).log().expand(20000, 5), top_k=top_k, top_p=top_p).flatten()
    counts = drawn.bincount(minlength=5).tolist()
    total = sum(probs[i] for i in left)
    assert [i for i in range(5) if counts[i]] == left
    for i in left:
        assert counts[i] / 20000 == pytest.approx(probs[i] / total, abs=0.02)


def test_top_p_near_zero_takes_the_likeliest():
    """A share so small that no token is within it."""
    assert sample_next(torch.zeros(50, 7).index_fill(1, torch.tensor([4]), 1e-3), top_p=1e-9).unique().tolist() == [4]


@pytest.mark.parametrize("top_k", [None, 40])
def test_rounding_in_the_logits_hardly_ever_changes_what_is_drawn(top_k):
    """Noise that belongs to ranks: where two tokens are nearly tied, they change places and another one is drawn."""
    torch.manual_seed(1)
    logits = torch.randn(1000, 50).round(decimals=1)  # many ties
    seeds = range(1000)
    drawn = sample_next(logits, top_k=top_k, generators=sources(*seeds))
    again = sample_next(logits + torch.randn(1000, 50) * 1e-6, top_k=top_k, generators=sources(*seeds))
    assert (drawn == again).float().mean() > 0.98


def test_a_tiny_temperature_takes_the_likeliest_token():
    """Logits that overflow when they are divided, so that a temperature just above 0 fails where 0 works."""
    assert sample_next(torch.tensor([[10.0, 9.0, -3.0]]), temperature=1e-40).tolist() == [[0]]


@pytest.mark.parametrize("bias", [True, False])
def test_a_tiny_model_overfits_one_batch(bias):
    """Parameters that get no gradient, or a loss that does not belong to the targets."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16, bias=bias))
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.99), "cpu")
    idx, targets = ids(4, 8), ids(4, 8, seed=3)
    for _ in range(150):
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_bfloat16_autocast_stays_near_float32():
    """A step that cannot be computed in 16 bits, or that loses the loss in them."""
    model, idx, targets = tiny(), ids(4, 8), ids(4, 8, seed=3)
    _, exact = model(idx, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("rows", [1, 5, 16, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_chunks_is_the_loss_and_has_its_gradients(rows, dtype):
    """A chunk left out or counted twice, a short last one, targets of -1 that count, a gradient that is not scaled."""
    whole, chunked = tiny(), tiny()
    idx, targets = ids(4, 8), ids(4, 8, seed=3)
    targets[0, :5] = targets[2] = -1
    losses = []
    for model, part in ((whole, 0), (chunked, rows)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss = model(idx, targets, loss_rows=part)
        (3 * loss).backward()
        losses.append(loss.item())
        assert (logits is None) == (part > 0)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= tolerance * p.grad.norm(), name


def test_a_loss_in_chunks_of_nothing_is_zero():
    """A division by zero where no target is to be learned."""
    model = tiny()
    _, loss = model(ids(2, 8), torch.full((2, 8), -1), loss_rows=4)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().sum() == 0 for p in model.parameters())


def test_a_loss_in_chunks_without_gradients_is_the_same():
    """Evaluation that fails for want of gradients, or computes them for nothing."""
    model = tiny()
    with torch.no_grad():
        _, whole = model(ids(2, 8), ids(2, 8, seed=3))
        _, chunked = model(ids(2, 8), ids(2, 8, seed=3), loss_rows=3)
    assert chunked.item() == pytest.approx(whole.item(), abs=1e-6)
    assert not chunked.requires_grad


def test_logits_of_a_chunk_are_all_that_is_in_memory():
    """Chunks that are kept until the end."""
    model = tiny(vocab_size=5000)
    sizes = []

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
        model(ids(64, 8), ids(64, 8), loss_rows=16)
    assert max(sizes) < 5000 * 64


@pytest.mark.parametrize("T", [2, 7, 64])
def test_explicit_attention_is_pytorchs(T):
    """Scores that are not scaled, a mask that lets a later position in, heads that are mixed up."""
    torch.manual_seed(1)
    heads = torch.randn(3, 3, 2, T, 8)
    expected = F.scaled_dot_product_attention(*heads, is_causal=True)
    torch.testing.assert_close(explicit_attention(heads, 0.0), expected)
    rounded = explicit_attention(heads.bfloat16(), 0.0)
    torch.testing.assert_close(rounded.float(), expected, atol=0.04, rtol=0.04)


def test_explicit_attention_drops_weights():
    """Dropout that is left out of attention, or does not keep the mean."""
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8), torch.ones(1, 1, 300, 8)
    y = explicit_attention(torch.stack((q, k, v)), 0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.1)
    assert y.std() > 0.05


@pytest.mark.parametrize("T", [FLASH_MIN_TOKENS, FLASH_MIN_TOKENS + 1])
def test_bfloat16_on_a_cpu_takes_the_attention_that_is_quick_there(T, monkeypatch):
    """Scores of a long context in memory all at once, or flash attention in 16 bits, six times as slow."""
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **b: seen.append(q.dtype) or attention(q, *a, **b))
    model = tiny(block_size=FLASH_MIN_TOKENS + 1, n_layer=1)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids(1, T), ids(1, T))
    assert seen == ([torch.float32] if T > FLASH_MIN_TOKENS else [])
