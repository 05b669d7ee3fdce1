"""look.py: the page's numbers are PyTorch's, in a real browser; its tokenizers are Python's; text cannot become markup."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configurator

import pytest
import torch
from conftest import ROOT, write_dataset
from torch.nn import functional as F

import look
from model import GPT, Bigram, GPTConfig, sample_next
from nanogpt import checkpoint, conversation, huggingface, inspection, page
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, IdTokenizer, JsonTokenizer, TableTokenizer, TiktokenTokenizer, Tokenizer, train_bpe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LETTERS = CharTokenizer(list("\nabcdefghij"))
SAMPLING = [
    (1, 0, 1),
    (0.5, 0, 1),
    (1.5, 4, 1),
    (1, 0, 0.6),
    (2, 7, 0.5),
    (0, 5, 0.5),
    (0.8, 200, 0.95),
]  # temperature, top_k, top_p
TEXT = "abba cabbage jade. "  # to train encodings on


def gpt(vocab_size: int, **shape: Any) -> GPT:
    """A random GPT whose attention and probabilities are far from uniform."""
    torch.manual_seed(1)
    shape = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.mul_(15 if "ln" not in name else 1).add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    return model


def bigram(vocab_size: int) -> Bigram:
    torch.manual_seed(1)
    return Bigram(GPTConfig(block_size=8, vocab_size=vocab_size)).requires_grad_(False)


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    """A tab of headless Chromium, driven by Playwright; `tab.complaints` are its errors, and other files that it asks for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.complaints = []

        def requested(request: Any) -> None:
            if not request.url.startswith(("file:", "data:")):
                tab.complaints.append(request.url)

        tab.on("request", requested)
        tab.on("console", lambda message: tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (tab.complaints.append("dialog"), dialog.dismiss()))
        yield tab
        browser.close()


@pytest.fixture
def show(tab: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that writes a model's page with these flags and opens it; no page may complain, or ask for another file."""

    def show(model: GPT | Bigram, tokenizer: Tokenizer, width: int = 1280, chat_format: Any = None, **flags: Any) -> Any:
        out_dir = tmp_path / "out"
        optimizer = model.requires_grad_(True).configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        extra = {"tokenizer": tokenizer.to_dict(), "model": "gpt" if isinstance(model, GPT) else "bigram"}
        extra |= {"chat_format": conversation.to_dict(chat_format)} if chat_format else {}
        config = {"dataset": str(flags.pop("dataset", "gone"))}
        out_dir.mkdir()
        checkpoint.save(out_dir / checkpoint.BEST, checkpoint.pack(model, optimizer, 10, 2.5, config, extra))
        model.requires_grad_(False)
        flags = {"device": "cpu", "out_dir": out_dir, "max_new_tokens": 0} | flags
        look.main(configurator.parse(look.Config, [f"--{key}={value}" for key, value in flags.items()]))
        tab.set_viewport_size({"width": width, "height": 800})
        tab.goto((out_dir / "look.html").as_uri())
        return tab

    tab.complaints.clear()
    yield show
    assert tab.complaints == []


def logits_of(opened: Any) -> torch.Tensor:
    """The logits of the page's own forward pass, (T, V)."""
    return torch.tensor(opened.evaluate("view.model.logits.map((row) => Array.from(row))"))


# activations


@pytest.mark.parametrize("gelu, bias", [("erf", True), ("tanh", False)])
def test_activations_equal_transformers(tmp_path: Path, gelu: str, bias: bool) -> None:
    """Catches hooks that keep the wrong tensor, or attention weights that are not the model's."""
    from transformers import AutoModelForCausalLM

    model = gpt(11, gelu=gelu, bias=bias)
    shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    huggingface.save(tmp_path, model.state_dict(), shape | {"dropout": 0.0}, gelu, LETTERS, torch.float32, None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = [1, 2, 2, 1, 0, 9]
    wanted = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    found = inspection.activations(model, ids)
    torch.testing.assert_close(found.logits, wanted.logits[0])
    torch.testing.assert_close(found.attention, torch.stack(wanted.attentions)[:, 0])
    torch.testing.assert_close(found.residual[:-1], torch.stack(wanted.hidden_states[:-1])[:, 0])
    torch.testing.assert_close(inspection.logit_lens(model, found.residual[-1]), found.logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_principal_components() -> None:
    """Catches components that are not those of the largest variance: here, on a line and a little beside it."""
    along = torch.linspace(-1, 1, 9)
    xy, shares = inspection.principal_components(torch.stack((3 * along, along**2, 4 * along), 1))
    torch.testing.assert_close(xy[:, 0].abs(), (5 * along).abs().double())
    assert shares[0] > 0.98 and shares.sum() == pytest.approx(1)


def test_shown_lines_are_those_of_model_py() -> None:
    """Catches a line number that is off, or a statement that model.py no longer has."""
    lines = (ROOT / "model.py").read_text(encoding="utf-8").splitlines()
    for function, marks in page.SHOWN_SOURCE.values():
        found = inspection.source(function, marks)
        for i, line in enumerate(found["text"].splitlines()):
            assert line.strip() == lines[found["line"] - 1 + i].strip()
        assert found["marks"].keys() == marks.keys()
        for name, (first, last) in found["marks"].items():
            assert marks[name] in " ".join(lines[first - 1 : last])


# the page's own forward pass


@pytest.mark.parametrize("gelu, bias", [("erf", True), ("tanh", False)])
def test_forward_pass_in_the_page(show, gelu, bias):
    """Catches a forward pass in JavaScript that is not model.py's: logits, attention, residual stream, logit lens."""
    model = gpt(11, gelu=gelu, bias=bias)
    opened = show(model, LETTERS, start="abcabca")
    wanted = inspection.activations(model, LETTERS.encode("abcabca"))
    torch.testing.assert_close(logits_of(opened), wanted.logits, atol=1e-3, rtol=0)
    assert opened.is_hidden("#note")
    for layer in range(2):
        rows = torch.tensor(opened.evaluate(f"[0, 1].map((head) => Array.from(view.attention({layer}, head, 6)))"))
        torch.testing.assert_close(rows, wanted.attention[layer, :, 6], atol=1e-4, rtol=0)
        lens = inspection.logit_lens(model, wanted.residual[layer, 6]).softmax(-1)
        found = opened.evaluate(f"view.lens({layer}, 6)")
        assert [token["id"] for token in found] == lens.topk(5).indices.tolist()
        assert [token["p"] for token in found] == pytest.approx(lens.topk(5).values.tolist(), abs=1e-4)
        assert opened.evaluate(f"view.norm({layer}, 6)") == pytest.approx(wanted.residual[layer, 6].norm().item(), rel=1e-4)
    probabilities = wanted.logits.softmax(-1)
    assert opened.evaluate("bits(6)") == pytest.approx(-probabilities[5, 1].log2().item(), abs=1e-3)
    shown = opened.locator("#bars li").evaluate_all("all => all.map((bar) => [+bar.dataset.id, +bar.dataset.plain])")
    assert dict(shown) == pytest.approx({i: probabilities[6, i].item() for i, _ in shown}, abs=1e-4)


def test_changed_model(show, monkeypatch):
    """Catches a page that says nothing of a model.py that computes something else than the page does."""
    monkeypatch.setattr("model.MLP.forward", lambda self, x: 2 * self.c_proj(self.gelu(self.c_fc(x))))
    opened = show(gpt(11), LETTERS, start="abcabca")
    assert "not those of model.py" in opened.inner_text("#note")


def test_typing(show):
    """Catches a cache that keeps what another text has computed, or a window that does not slide."""
    model = gpt(11)
    opened = show(model, LETTERS, start="abc")
    for text in ("abcd", "abxd".replace("x", "e"), "jab", "jabbadabba", "abbadabbac"):
        opened.fill("#text", text)
        wanted = inspection.activations(model, LETTERS.encode(text)[-8:])
        torch.testing.assert_close(logits_of(opened), wanted.logits, atol=1e-3, rtol=0)
    assert opened.locator("#tokens .outside").count() == 2
    opened.fill("#text", "aé")
    assert "é" in opened.inner_text("#note") and opened.evaluate("allIds()") == [1]


def test_greedy_text_is_the_same(show):
    """Catches generation in the page that differs from generate(), also once the window slides."""
    model = gpt(11)
    wanted = model.generate(torch.tensor([[1, 2, 3]]), 15, temperature=0)[0, 3:].tolist()
    opened = show(model, LETTERS, start="abc", temperature=0)
    opened.evaluate("for (let i = 0; i < 15; i++) $('write').click()")
    assert opened.evaluate("state.written") == wanted


def test_what_look_wrote(show):
    """Catches a continuation in the page that is not the one of generate(), or one that pushes the prompt out of the window."""
    model = gpt(11)
    wanted = model.generate(torch.tensor([[1, 2, 3]]), 12, temperature=0)[0].tolist()
    opened = show(model, LETTERS, start="abc", temperature=0, max_new_tokens=12)
    shown = opened.locator("#tokens .token small").all_inner_texts()
    assert list(map(int, shown)) == wanted
    assert opened.locator("#tokens .written").count() == 12
    assert "token 8 of 15" in opened.inner_text("#chosen")  # the first that the model still sees


# sampling


@pytest.mark.parametrize("recorded", [False, True])
def test_sliders_agree_with_sample_next(show, monkeypatch, recorded):
    """Catches another order of temperature, top-k and top-p, or another set of tokens that is kept."""
    monkeypatch.setattr(page, "PAGE_PARAMETERS", 0 if recorded else page.PAGE_PARAMETERS)
    model = gpt(11)
    opened = show(model, LETTERS, start="abc")
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    for temperature, top_k, top_p in SAMPLING:
        opened.evaluate(
            "values => { for (const [id, value] of Object.entries(values)) {"
            "  $(id).value = value; $(id).dispatchEvent(new Event('input')); } }",
            {"temperature": temperature, "top_k": top_k, "top_p": top_p},
        )
        shown = opened.locator("#bars li").evaluate_all("all => all.map((bar) => [+bar.dataset.id, +bar.dataset.p])")
        torch.manual_seed(1)
        drawn = sample_next(logits[0].expand(40_000, -1), temperature, top_k, top_p)[:, 0]
        frequencies = torch.bincount(drawn, minlength=11) / 40_000
        assert dict(shown) == pytest.approx(dict(enumerate(frequencies.tolist())), abs=0.015)
        kept = {i for i, p in shown if p > 0}
        assert {i for i, p in enumerate(frequencies) if p > 0} <= kept
        assert len(kept) == int(opened.get_attribute("#kept", "data-kept"))


# what a larger model has computed


def test_recorded_numbers(show, monkeypatch):
    """Catches numbers of a larger model that are not PyTorch's, to 1e-4."""
    monkeypatch.setattr(page, "PAGE_PARAMETERS", 0)
    monkeypatch.setattr(page, "RECORDED_CHOICES", 6)
    model = gpt(11, gelu="tanh")
    ids = LETTERS.encode("abcabca")
    opened = show(model, LETTERS, start="abcabca", temperature=1)
    wanted = inspection.activations(model, ids)
    logprobs = wanted.logits.log_softmax(-1)
    for t in range(7):
        if t:
            assert opened.evaluate(f"view.logprob({t})") == pytest.approx(logprobs[t - 1, ids[t]].item(), abs=1e-4)
        assert opened.evaluate(f"Array.from(view.choices({t}).ids)") == logprobs[t].topk(6).indices.tolist()
        for temperature in (0.5, 1.0, 2.0):
            found = opened.evaluate(f"(({{p, rest}}) => [...p, rest])(distribution(view.choices({t}), {temperature}, 0, 0))")
            probabilities = (wanted.logits[t] / temperature).softmax(-1).topk(11).values
            assert found == pytest.approx([*probabilities[:6].tolist(), probabilities[6:].sum().item()], abs=1e-4)
    for layer in range(3):
        lens = inspection.logit_lens(model, wanted.residual[layer]).softmax(-1).topk(5)
        found = opened.evaluate(f"view.ids.map((_, t) => view.lens({layer}, t))")
        assert [[token["id"] for token in row] for row in found] == lens.indices.tolist()
        torch.testing.assert_close(
            torch.tensor([[token["p"] for token in row] for row in found]), lens.values, atol=1e-4, rtol=0
        )
        norms = opened.evaluate(f"view.ids.map((_, t) => view.norm({layer}, t))")
        torch.testing.assert_close(torch.tensor(norms), wanted.residual[layer].norm(dim=-1), atol=1e-4, rtol=1e-5)
    for layer in range(2):
        for head in range(2):
            rows = opened.evaluate(f"view.ids.map((_, t) => Array.from(view.attention({layer}, {head}, t)))")
            for t, row in enumerate(rows):
                assert row == pytest.approx(wanted.attention[layer, head, t, : t + 1].tolist(), abs=1e-4)
    directions = F.normalize(model.transformer.wte.weight, dim=-1)
    cosines = (directions[1] @ directions.T).tolist()
    assert {near["id"]: near["cosine"] for near in opened.evaluate("neighbors(1)")} == pytest.approx(
        {i: cosine for i, cosine in enumerate(cosines) if i != 1}, abs=1e-4
    )
    weight = model.transformer.wte.weight
    wanted = F.cosine_similarity(weight[1] - weight[2] + weight[3], weight).topk(10)
    found = opened.evaluate("sum(1, 2, 3)")
    assert [token["id"] for token in found] == wanted.indices.tolist()
    assert [token["cosine"] for token in found] == pytest.approx(wanted.values.tolist(), abs=1e-4)


def test_recorded_generation(show, monkeypatch):
    """Catches steps of a recorded generation that are not those of the text that look.py wrote."""
    monkeypatch.setattr(page, "PAGE_PARAMETERS", 0)
    opened = show(gpt(11), LETTERS, start="abc", max_new_tokens=3)
    written = opened.evaluate("state.written")
    assert opened.evaluate("$('text').readOnly") and "5 million" in opened.inner_text("footer")
    for length in (4, 5, 6):
        assert opened.evaluate("stepIds().length") == length - 1
        opened.click("#step-token")
    assert opened.evaluate("stepIds()") == [1, 2, 3, *written]
    assert opened.is_disabled("#step")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"max_new_tokens": 8}, "--max_new_tokens must be below 8 for a model of this size, got 8"),
        ({"out": "look.png"}, "--out must end in .html, got 'look.png'"),
        ({"out": "none/look.html"}, "--out=none/look.html: cannot be written"),
    ],
)
def test_mistakes(show, monkeypatch, flags, message):
    """Catches a page without a prompt, and a traceback for a file that cannot be written."""
    monkeypatch.setattr(page, "PAGE_PARAMETERS", 0)
    with pytest.raises(UserError, match=re.escape(message)):
        show(gpt(11), LETTERS, start="abc", **flags)


def test_long_prompt_of_a_larger_model(show, monkeypatch, capsys):
    """Catches a text of more tokens than the page of a larger model can show."""
    monkeypatch.setattr(page, "PAGE_PARAMETERS", 0)
    opened = show(gpt(11), LETTERS, start="abcdefghij", max_new_tokens=3)
    assert opened.evaluate("state.prompt") == [6, 7, 8, 9, 10]
    assert "only the last 5 of the prompt's 10 tokens" in capsys.readouterr().err


# tokenizers


SAMPLES = [
    "abba cabbage",
    "  a  b\n\n c\t",
    "I'll we'VE it's 1234567 x=1;",
    "Ünïcödé 👍🏽 ¿é\u0301\u3000\u00a0a\u0085b",
    "<|endoftext|>a<|endoftext|",
    "don't!! ...\r\n\r\n x\ufeffy \u017f'\u017f '\u017f",
    "日本語 ١٢٣٤ ²½",
]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_byte_pair_encoding_in_the_page(show, pattern):
    """Catches another way to split or to merge than that of the tokenizers library."""
    tokenizer = train_bpe([TEXT * 9 + " ".join(SAMPLES) * 3], 330, pattern)
    opened = show(gpt(tokenizer.model_vocab_size), tokenizer, start="abba")
    found = opened.evaluate("texts => texts.map((text) => tokenizer.encode(text).ids)", SAMPLES)
    assert found == [tokenizer.encode(text) for text in SAMPLES]
    assert (
        opened.evaluate("text => tokenizer.encode(text, true).ids", SAMPLES[4]) == tokenizer.encode_array(SAMPLES[4]).tolist()
    )
    assert opened.evaluate("ids => tokenizer.decode(ids)", tokenizer.encode(SAMPLES[3])) == SAMPLES[3]


def test_gpt2_encoding_in_the_page(show, gpt2_vocabulary):
    """Catches ids that are not tiktoken's, for a small model with GPT-2's vocabulary."""
    tokenizer = TiktokenTokenizer("gpt2")
    opened = show(gpt(tokenizer.model_vocab_size, n_embd=8, n_layer=1), tokenizer, start="Hello world")
    texts = [*SAMPLES, "The quick brown fox jumps over the lazy dog, and indistinguishably so."]
    assert opened.evaluate("texts => texts.map((text) => tokenizer.encode(text).ids)", texts) == list(
        map(tokenizer.encode, texts)
    )


def test_bytes_and_special_tokens(show):
    """Catches a part of a character that is shown as text, or a special token that looks like any other."""
    tokenizer = train_bpe([], 257)
    opened = show(gpt(tokenizer.model_vocab_size, block_size=32), tokenizer, start="é👍<|endoftext|>")
    assert opened.evaluate("allIds()") == tokenizer.encode("é👍<|endoftext|>")
    assert opened.evaluate("allIds().map(label)") == ["\\xc3", "\\xa9", "\\xf0", "\\x9f", "\\x91", "\\x8d", "<|endoftext|>"]
    assert opened.locator("#tokens .special").count() == 1
    opened.fill("#text", "日本")
    assert opened.evaluate("allIds()") == tokenizer.encode("日本")


@pytest.mark.parametrize(
    "tokenizer, start, typed",
    [(TableTokenizer(["to", " be", "\n", "t", "o", "tobe"]), "to be", "tobeto\nt"), (IdTokenizer(11), "3 1", "10 0 7")],
)
def test_other_tables(show, tokenizer, start, typed):
    """Catches another match than the longest, and ids that are read as text."""
    opened = show(gpt(11), tokenizer, start=start)
    assert opened.evaluate("allIds()") == tokenizer.encode(start)
    opened.fill("#text", typed)
    assert opened.evaluate("allIds()") == tokenizer.encode(typed)


def test_large_vocabulary_in_the_page(show):
    """Catches a page that is dead for the 200,000 tokens of o200k_base: JavaScript takes fewer arguments than that."""
    opened = show(gpt(11), LETTERS, start="a")
    tokens = "new Map(Array.from({ length: 200_000 }, (_, i) => [i, new TextEncoder().encode(String(i))]))"
    assert opened.evaluate(f"new Tokenizer({{ special: {{}} }}, {tokens}).longest") == 6


def test_tokenizer_that_the_page_lacks(show):
    """Catches a page that encodes text in another way than its model's tokenizer, instead of saying that it cannot."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.WordLevel({"<unk>": 0, "to": 1, "be": 2}, unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    opened = show(gpt(64), JsonTokenizer(library.to_str()), start="to be")
    assert opened.evaluate("$('text').readOnly") and "cannot encode" in opened.inner_text("#note")
    opened.click("#write")
    assert opened.locator("#tokens .token").count() == 3


# text that would like to be more than text


def test_hostile_text(show):
    """Catches a token, a prompt or a name that becomes markup, or that ends the script that holds it."""
    tags = ["</script><script>document.title='x'</script>", "<img src=x onerror=alert(1)>", "<!--"]
    strings = [*tags, "\u2028", "\u202eabc", "{{scripts}}", "&lt;", "\\u003c"]
    tokenizer = TableTokenizer(strings)
    opened = show(gpt(len(strings), block_size=16), tokenizer, start="".join(strings))
    assert opened.evaluate("allIds()") == list(range(8))
    assert opened.locator("#tokens .token").first.evaluate("token => token.firstChild.data") == strings[0].replace(" ", "␣")
    assert opened.evaluate("[label(3), label(4), $('text').value]") == ["U+2028", "U+202Eabc", "".join(strings)]
    assert opened.locator("img").count() == 0 and opened.locator("script").count() == 2
    assert opened.title().startswith("Inside ")


def test_data_holds_no_markup() -> None:
    """Catches JSON that a browser could leave: every character that HTML or JavaScript minds is escaped."""
    hostile = "</script><!-- ]]> & \u2028\u2029 👍 é"
    html = page.assemble({"title": hostile}).decode("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert json.loads(found)["title"] == hostile
    assert found.isascii() and not set("<>&") & set(found)


# the bigram model, chats


def test_bigram_table(show, tmp_path):
    """Catches counts that are not those of the training text, or probabilities that are not the model's."""
    text = "abacab\n" * 50
    write_dataset(tmp_path / "data", text)
    tokenizer = CharTokenizer.from_text(text)
    model = bigram(tokenizer.vocab_size)
    opened = show(model, tokenizer, start="ab", dataset=tmp_path / "data")
    train = text[: int(len(text) * 0.9)]
    wanted = [[train.count(a + b) for b in tokenizer.characters] for a in tokenizer.characters]
    found = torch.tensor(opened.evaluate("Array.from(counts)")).view(4, 4)
    assert (found - torch.tensor(wanted)).abs().max() == 0
    torch.testing.assert_close(logits_of(opened), model.token_embedding_table.weight[[1, 2]], atol=1e-3, rtol=0)
    opened.focus("#table")
    opened.keyboard.press("ArrowUp")
    assert opened.evaluate("cell.row") == 1
    assert f"came {wanted[1][opened.evaluate('cell.column')]} times" in opened.inner_text("#table-cell")
    assert opened.is_hidden("#s-attention") and opened.is_visible("#s-table")


@pytest.mark.parametrize("name", ["plain", "dialogpt"])
def test_chat(show, name):
    """Catches a message that is put into another form than in training, by look.py or by the page."""
    tokenizer, chat_format = train_bpe([], 257), conversation.FORMATS[name]
    opened = show(gpt(tokenizer.model_vocab_size, block_size=64), tokenizer, chat_format=chat_format, start="Hi.", chat=True)

    def wanted(message: str) -> list[int]:
        opening = conversation.encode_opening(chat_format, tokenizer)
        return opening + conversation.encode_prompt_turn(chat_format, message, tokenizer)

    assert opened.evaluate("allIds()") == wanted("Hi.") and opened.input_value("#text") == "Hi."
    opened.fill("#text", "A<|endoftext|>")  # a message has no special tokens
    assert opened.evaluate("allIds()") == wanted("A<|endoftext|>")
    opened.uncheck("#chat")
    assert opened.evaluate("allIds()") == tokenizer.encode("A<|endoftext|>")


# clicks and keys


def test_clicks_and_keys(show):
    """Catches a part of the page that no longer answers."""
    opened = show(gpt(11), LETTERS, start="abcabc", max_new_tokens=2)
    opened.locator("#tokens .token").nth(1).click()
    assert "token 2 of 8" in opened.inner_text("#chosen")
    opened.keyboard.press("ArrowRight")
    assert "token 3 of 8" in opened.inner_text("#chosen")
    opened.click("#next")
    assert opened.inner_text("#detail dd >> nth=1") == "3 (0 to 7)"
    opened.click("#heads button >> nth=3")
    assert opened.inner_text("#head-name") == "Layer 1, head 1"
    opened.keyboard.press("ArrowLeft")
    assert opened.inner_text("#head-name") == "Layer 1, head 0"
    weights = opened.locator("#attended li").evaluate_all("all => all.map((bar) => +bar.dataset.p)")
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    opened.click("[data-part=mlp]")
    assert "self.gelu(self.c_fc(x))" in opened.inner_text("#part-code .on")
    assert "2,128 \u00d7 2 blocks" in opened.inner_text("#part")  # 16 x 64 and 64 x 16 weights, 64 and 16 biases
    opened.select_option("#word-a", "2")
    assert opened.locator("#sum li").count() == 10
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.click("#theme")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_stepping_through_generate(show):
    """Catches a step that shows other shapes than generate() has, or another line of model.py."""
    opened = show(gpt(11), LETTERS, start="abcabcab", temperature=1, top_k=4)  # as long as the context
    shapes, lines = [], []
    for _ in range(9):
        shapes.append(opened.inner_text("#step-view .shapes b"))
        lines.append(" ".join(opened.locator("#step-code .on").all_inner_texts()))
        opened.click("#step")
    assert shapes == ["(1, 8)", "(1, 8)", "(1, 8, 11)", "(1, 11)", "(1, 11)", "(1, 4)", "(1, 4)", "(1, 1)", "(1, 9)"]
    assert "cache=cache" in lines[1] and "self.lm_head(x)" in lines[2] and "sample_next(logits[:, -1" in lines[3]
    assert "gumbel" in lines[7] and "torch.cat((idx, token), dim=1)" in lines[8]
    assert opened.evaluate("allIds().length") == 9
    opened.click("#step")
    assert opened.inner_text("#step-view .shapes b") == "(1, 8)"  # idx is (1, 9), the window (1, 8)
    assert "idx[:, -block_size:]" in opened.inner_text("#step-code .on")


def test_phone(show):
    """Catches a page that is wider than a phone."""
    opened = show(gpt(11, n_head=4), LETTERS, width=390, start="abcabc\nabc")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
