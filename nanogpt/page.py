"""The page of look.py: one HTML file that holds a model, or what a larger one has computed, and needs no network.

    html = build(model, tokenizer, prompt_ids, written_ids, {"title": "out-mine/ckpt.pt", ...})

A model of up to PAGE_PARAMETERS is in the page itself, in 16 bits a weight, and runs there (web/model.js). Of a larger one,
the page holds what it computed for one text: attention, the likeliest tokens of each distribution, the logit lens, the norms
of the residual stream.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from model import GPT, MLP, Bigram, Block, CausalSelfAttention, LanguageModel, sample_next
from nanogpt.conversation import ChatFormat, encode_opening
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.inspection import activations, logit_lens, principal_components, source
from nanogpt.tokenizer import (
    END_OF_TEXT,
    PATTERNS,
    IdTokenizer,
    JsonTokenizer,
    TableTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    letters,
)

WEB = Path(__file__).resolve().parent / "web"
SCRIPTS = ("model.js", "tokenizer.js", "elements.js", "numbers.js", "pictures.js", "steps.js", "page.js")  # in this order
PAGE_PARAMETERS = 5_000_000  # at most in a page, at 2 bytes each
RECORDED_TOKENS = 64  # of a text, at most, in the page of a larger model
RECORDED_CHOICES = 256  # likeliest tokens of each distribution; the rest is one number
LENS_CHOICES = 5  # likeliest tokens of each layer
NEIGHBORS = 12  # nearest tokens of each embedding
MAP_TOKENS = 1500  # on the map of the embeddings, besides those of the text
WORDS = 600  # whole words for a - b + c, those of low ids
SMALL_VOCABULARY = 300  # with no more tokens, all of them may be calculated with
COUNTED_TOKENS = 1 << 24  # of a dataset at a time
TEMPERATURES = [i / 20 for i in range(1, 41)]  # the stops of the page's slider above 0
GPT2_SPLIT = ("gpt2", "r50k_base", "p50k_base")  # encodings of tiktoken that split a text as GPT-2's does
ANALOGY_WORDS = (
    "king queen man woman boy girl father mother brother sister son daughter uncle aunt he she his her actor actress "
    "Paris France London England Rome Italy Berlin Germany Tokyo Japan Madrid Spain good better best bad worse worst "
    "big bigger small smaller walk walked walking talk talked talking go went come came one two three dog dogs cat cats"
).split()
SHOWN_SOURCE = {  # functions of model.py that the page shows, and the statements in them that it points at
    "GPT.forward": (
        GPT.forward,
        {
            "embed": "x = self.transformer.wte(idx)",
            "blocks": "x = block(x, past, position, last_only)",
            "ln_f": "x = self.transformer.ln_f(x)",
            "lm_head": "logits = self.lm_head(x)",
            "returns": "return logits, None",
        },
    ),
    "Block.forward": (
        Block.forward,
        {"attn": "self.attn(self.ln_1(x)", "add": "x = (x[:, -1:] if last_only else x)", "mlp": "self.mlp(self.ln_2(x))"},
    ),
    "CausalSelfAttention.forward": (
        CausalSelfAttention.forward,
        {"qkv": "qkv = self.c_attn(x)", "attend": "F.scaled_dot_product_attention", "proj": "self.c_proj(y)"},
    ),
    "MLP.forward": (MLP.forward, {"mlp": "self.c_proj(self.gelu(self.c_fc(x)))"}),
    "LanguageModel.stream": (
        LanguageModel.stream,
        {
            "window": "self(idx[:, -block_size:])",
            "decode": "self(idx[:, cache.length :]",
            "last": "token = sample_next(",
            "cat": "idx = torch.cat(",
        },
    ),
    "sample_next": (
        sample_next,
        {
            "greedy": "return logits.argmax",
            "scale": "logits.float() / temperature",
            "top_k": "logits.topk(k)",
            "top_p": "logits.masked_fill(before >= p",
            "noise": "gumbel = ",
            "draw": "drawn = ",
        },
    ),
    "Bigram.forward": (Bigram.forward, {"table": "return self.token_embedding_table(idx[:, [-1]])"}),
}


@torch.inference_mode()
def build(
    model: GPT | Bigram, tokenizer: Tokenizer, prompt_ids: list[int], written_ids: list[int], about: dict[str, Any]
) -> bytes:
    """Return the page, UTF-8, for a prompt and what the model wrote after it.

    `about` goes into the page as it is: title, prompt, sampling, chat (see look.py). A model that does not fit into a page
    must get at most `recorded_tokens(model)` tokens in all. Raises UserError for a bigram table that does not fit.
    """
    data = about | {
        "kind": "gpt" if isinstance(model, GPT) else "bigram",
        "config": {name: getattr(model.config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")},
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "source": {name: source(function, marks) for name, (function, marks) in SHOWN_SOURCE.items()},
        "prompt_ids": prompt_ids,
        "written_ids": written_ids,
    }
    data["config"] |= {"bias": model.config.bias, "gelu": model.config.gelu}
    if runs_in_page(model):
        data["tokenizer"] = tokenizer_data(tokenizer)
        shown = range(tokenizer.vocab_size)
        idx = torch.tensor([(prompt_ids + written_ids)[-model.config.block_size :]], device=next(model.parameters()).device)
        data["logits"] = pack(model(idx)[0][0, -1, : tokenizer.vocab_size], "float32")  # for the page to compare with its own
        data["weights"] = {name: pack_weights(parameter) for name, parameter in model.named_parameters()}
        if isinstance(model, GPT):
            data["embeddings"] = embedding_map(model, tokenizer.vocab_size, list(shown))
            data["words"] = calculable(tokenizer)
    elif isinstance(model, GPT):
        data["words"] = calculable(tokenizer)
        data["recorded"], ids = record(model, tokenizer, prompt_ids + written_ids, data["words"])
        shown = sorted(ids)
        why = f"the page of a model with more than {PAGE_PARAMETERS:,} parameters shows a text computed beforehand"
        data["tokenizer"] = {"kind": "none", "why": why, "special": special_tokens(tokenizer), "size": tokenizer.vocab_size}
    else:
        raise UserError(f"a bigram table must have at most {PAGE_PARAMETERS:,} entries to fit into a page")
    pieces = [tokenizer.token_bytes(i) for i in shown]
    data["tokens"] = {
        "ids": pack(np.array(shown), "uint32"),
        "lengths": pack(np.array([len(piece) for piece in pieces]), "uint16"),
        "bytes": pack(np.frombuffer(b"".join(pieces), np.uint8), "uint8"),
    }
    return assemble(data)


def runs_in_page(model: GPT | Bigram) -> bool:
    """Whether a model is small enough for the page."""
    return model.get_num_params(non_embedding=False) <= PAGE_PARAMETERS


def recorded_tokens(model: GPT | Bigram) -> int:
    """Return how many tokens the page of a model that does not fit into it can show."""
    return min(RECORDED_TOKENS, model.config.block_size)


def assemble(data: dict[str, Any]) -> bytes:
    """Return the files of web/ as one, with `data` as JSON that no text in it can leave."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028, no bidi mark
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    scripts = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = (WEB / "page.html").read_text(encoding="utf-8")
    for name, part in (("style", (WEB / "page.css").read_text(encoding="utf-8")), ("scripts", scripts), ("data", text)):
        page = page.replace(f"{{{{{name}}}}}", part)
    return page.encode()


def pack(values: torch.Tensor | np.ndarray, dtype: str) -> dict[str, Any]:
    """Return numbers as JSON: their type, their shape, and their little-endian bytes in base64."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    stored = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    return {"dtype": dtype, "shape": list(array.shape), "data": base64.b64encode(stored.tobytes()).decode("ascii")}


def pack_weights(parameter: torch.Tensor) -> dict[str, Any]:
    """Return a parameter in 16 bits: whole numbers up to 32,767, and a scale for each row.

    Ten times as precise as float16: logits of the laptop model are within 0.002 of PyTorch's, instead of 0.013.
    """
    rows = parameter.detach().float().reshape(-1, parameter.size(-1))
    scales = rows.abs().amax(1).clamp(min=1e-30) / 32767
    whole = (rows / scales[:, None]).round()
    return {"whole": pack(whole.reshape(parameter.shape), "int16"), "scales": pack(scales, "float32")}


# tokenizers


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the special tokens that a prompt may hold, with their ids."""
    if isinstance(tokenizer, JsonTokenizer):
        added = json.loads(tokenizer.to_dict()["content"])["added_tokens"]
        return {token["content"]: token["id"] for token in added if token["special"]}
    return {} if tokenizer.end_of_text is None else {END_OF_TEXT: tokenizer.end_of_text}


def tokenizer_data(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the page needs to encode text itself, or why it cannot: {"kind", "special", "size", ...}."""
    data = {"special": special_tokens(tokenizer), "size": tokenizer.vocab_size}
    if isinstance(tokenizer, TableTokenizer):
        return data | {"kind": "table"}
    if isinstance(tokenizer, IdTokenizer):
        return data | {"kind": "ids"}
    if isinstance(tokenizer, TiktokenTokenizer) and tokenizer.name in GPT2_SPLIT:
        return data | {"kind": "bpe", "pattern": "gpt2"}  # the order of merges is that of the ids
    if isinstance(tokenizer, JsonTokenizer) and (found := byte_pairs(json.loads(tokenizer.to_dict()["content"]))):
        pattern, merges = found
        return data | {"kind": "bpe", "pattern": pattern, "merges": pack(np.array(merges).reshape(-1, 2), "uint32")}
    return data | {"kind": "none", "why": f"the page cannot encode text with this tokenizer ({tokenizer})"}


def byte_pairs(description: dict[str, Any]) -> tuple[str, list[tuple[int, int]]] | None:
    """Return the name of the pattern and the merges, as pairs of ids, of a byte-level BPE; None for other tokenizers.

    `description` is a tokenizer.json. None, too, if it has steps that web/tokenizer.js has not.
    """
    splits = {
        "gpt2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
        "cl100k": [
            {"type": "Split", "pattern": {"Regex": PATTERNS["cl100k"]}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }
    model, split = description["model"], description["pre_tokenizer"] or {}
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in split.get("pretokenizers", [split])]
    pattern = next((name for name, wanted in splits.items() if steps == wanted), None)
    unusual = any(model.get(key) for key in ("end_of_word_suffix", "byte_fallback", "ignore_merges", "unk_token"))
    unusual = unusual or any(
        not token["special"] or token["single_word"] or token["lstrip"] or token["rstrip"] or token["normalized"]
        for token in description["added_tokens"]
    )
    if model["type"] != "BPE" or pattern is None or unusual or description["normalizer"]:
        return None
    vocabulary = model["vocab"]
    if not vocabulary.keys() >= set(letters()):
        return None
    return pattern, [(vocabulary[left], vocabulary[right]) for left, right in model["merges"]]


# what the page cannot compute


def embedding_map(model: GPT, vocab_size: int, shown: list[int]) -> dict[str, Any]:
    """Return the principal components of the token embeddings: coordinates of the tokens `shown`, and shares of variance."""
    coordinates, shares = principal_components(model.transformer.wte.weight[:vocab_size].cpu())
    return {"ids": pack(np.array(shown), "uint32"), "xy": pack(coordinates[shown], "float32"), "shares": shares.tolist()}


@torch.inference_mode()
def record(model: GPT, tokenizer: Tokenizer, ids: list[int], words: list[int]) -> tuple[dict[str, Any], set[int]]:
    """Return what a model computes for one text of T tokens, as the page reads it, and the ids of all tokens in that.

    `words` are the tokens for a - b + c.
    """
    found = activations(model, ids)
    T, V = len(ids), tokenizer.vocab_size
    logits = found.logits[:, :V].cpu().double()  # Apple's GPUs have no float64

    # the next token: the likeliest, the rest as one number for each stop of the temperature's slider, and the one in the text
    top, choices = logits.topk(min(RECORDED_CHOICES, V))  # (T, choices) each
    others = logits.scatter(1, choices, -torch.inf)
    rest = torch.stack([(others / temperature).logsumexp(-1) for temperature in TEMPERATURES], 1)  # (T, temperatures)
    following = torch.tensor(ids[1:])[:, None]
    chances = logits.log_softmax(-1)[:-1].gather(1, following)[:, 0]

    # what each layer would say
    lens = [logit_lens(model, layer)[:, :V].cpu().double().softmax(-1).topk(min(LENS_CHOICES, V)) for layer in found.residual]
    lens_ids = torch.stack([layer.indices for layer in lens])  # (n_layer + 1, T, choices)

    # embeddings: nearest tokens of those in the text, cosines between words, and the map
    embeddings = model.transformer.wte.weight[:V].cpu()
    directions = F.normalize(embeddings, dim=-1)
    occurring = sorted(set(ids))
    cosines, nearest = (directions[occurring] @ directions.T).topk(min(NEIGHBORS + 1, V))  # each token's first is itself
    gram = directions[words] @ directions[words].T
    on_map = sorted({*words, *range(min(MAP_TOKENS, V)), *occurring, *nearest.flatten().tolist()})

    rows, columns = torch.tril_indices(T, T)
    recorded = {
        "attention": pack((found.attention[:, :, rows, columns].cpu() * 65535).round(), "uint16"),  # row after row
        "top": pack(top, "float32"),
        "choices": pack(choices, "uint32"),
        "rest": pack(rest, "float32"),
        "logprobs": pack(chances, "float32"),
        "lens_ids": pack(lens_ids, "uint32"),
        "lens": pack(torch.stack([layer.values for layer in lens]), "float32"),
        "norms": pack(found.residual.norm(dim=-1), "float32"),  # (n_layer + 1, T)
        "occurring": occurring,
        "nearest": pack(nearest, "uint32"),
        "cosines": pack(cosines, "float32"),
        "word_norms": pack(embeddings[words].norm(dim=-1), "float32"),
        "gram": pack((gram * 32767).round(), "int16"),
        "map": embedding_map(model, V, on_map),
    }
    return recorded, {*on_map, *choices.flatten().tolist(), *lens_ids.flatten().tolist()}


def calculable(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens for a - b + c: all of a small vocabulary, else whole words, WORDS and ANALOGY_WORDS."""
    if tokenizer.vocab_size <= SMALL_VOCABULARY:
        return [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)]
    wanted = {f" {word}".encode() for word in ANALOGY_WORDS}
    words = [i for i in range(tokenizer.vocab_size) if re.fullmatch(rb" [A-Za-z]{3,}", tokenizer.token_bytes(i))]
    return sorted({*words[:WORDS], *(i for i in words if tokenizer.token_bytes(i) in wanted)})


def chat_data(chat_format: ChatFormat, tokenizer: Tokenizer, on: bool) -> dict[str, Any]:
    """Return what puts a message into a chat format, and whether the prompt is one."""
    names = ("name", "user", "lead", "user_end", "assistant", "stop")
    return {name: getattr(chat_format, name) for name in names} | {"opening": encode_opening(chat_format, tokenizer), "on": on}


def bigram_counts(tokenizer: Tokenizer, dataset: str) -> dict[str, Any] | None:
    """Return how often each token follows each in a dataset's training split, (V, V); None if it is not there."""
    try:
        found = Dataset(dataset)
    except (UserError, OSError):
        return None
    if found.tokenizer.to_dict() != tokenizer.to_dict():
        return None
    V = tokenizer.vocab_size
    ids = np.memmap(found.folder / "train.bin", found.dtype, mode="r")
    counts = np.zeros(V * V, dtype=np.int64)
    for first in range(0, len(ids) - 1, COUNTED_TOKENS):
        pairs = ids[first : first + COUNTED_TOKENS + 1].astype(np.int64)
        counts += np.bincount(pairs[:-1] * V + pairs[1:], minlength=V * V)
    return pack(counts.reshape(V, V), "uint32")
