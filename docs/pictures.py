"""Draw the pictures of from_bigram_to_gpt.md, and measure its "A - a + b", from a run of the bigram model and a run of a GPT.

python train.py config/train_bigram_char.py
python train.py config/train_shakespeare_char_cpu.py
python docs/pictures.py
"""

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator

import numpy as np
import torch
from torch.nn import functional as F

from model import GPT, Bigram
from nanogpt import checkpoint
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.metrics import read_rows
from nanogpt.tokenizer import CharTokenizer

VAL_WINDOWS = 200  # windows of the validation split on which attention is measured
GREY, BLUE, ORANGE, GREEN = "#777777", "#1f5fa8", "#c2560a", "#2d7d46"
NAMES = {"\n": "↵", " ": "·"}  # how invisible characters are drawn


@dataclass(frozen=True)
class Config(configurator.Config):
    bigram: str = "out-bigram-char"  # folder of a run of the bigram model
    gpt: str = "out-shakespeare-char-cpu"  # folder of a run of a GPT on the same dataset
    text: str = "GREMIO:\nGood morrow, neighbour Baptista."  # text to draw attention on; this one is from the validation split
    out_dir: str = "docs"  # folder for the pictures


def main(config: Config) -> None:
    import matplotlib

    matplotlib.use("Agg")
    bigram, tokenizer, _ = checkpoint.load_model(config.bigram, "")
    gpt, gpt_tokenizer, ckpt = checkpoint.load_model(config.gpt, "")
    if not (isinstance(bigram, Bigram) and isinstance(gpt, GPT) and isinstance(tokenizer, CharTokenizer)):
        raise UserError(
            f"--bigram must be a run of a character-level bigram model and --gpt one of a GPT, got {config.bigram} and "
            f"{config.gpt}; train them with config/train_bigram_char.py and config/train_shakespeare_char_cpu.py"
        )
    if tokenizer.to_dict() != gpt_tokenizer.to_dict():
        raise UserError(
            f"--bigram and --gpt must have the same characters, but {config.bigram} and {config.gpt} do not; train both on "
            "one dataset"
        )
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    draw_table(bigram, tokenizer, out_dir / "bigram_table.png")
    draw_heads(gpt, tokenizer, Dataset(ckpt.config["dataset"]), config.text, out_dir / "attention.png")
    draw_losses(Path(config.bigram), Path(config.gpt), tokenizer.vocab_size, out_dir / "losses.png")
    draw_embeddings(gpt.transformer.wte.weight.detach(), tokenizer.characters, out_dir / "embeddings.png")
    compare_cases(gpt.transformer.wte.weight.detach(), tokenizer.characters)
    draw_generate(gpt, tokenizer, config.text[0], out_dir / "generate.png")  # the last one, since it shortens the context


def draw_table(model: Bigram, tokenizer: CharTokenizer, path: Path) -> None:
    """Draw the softmax of each row of the bigram model's table."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    probs = F.softmax(model.token_embedding_table.weight.detach(), dim=-1)  # (V, V)
    figure, axes = plt.subplots(figsize=(9.4, 8.6), layout="constrained")
    image = axes.imshow(probs, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    label_cells(axes, tokenizer.characters)
    axes.set(xlabel="next character", ylabel="character  (↵ line break, · space)")
    axes.set_title("What the bigram model has learned: the softmax of its table")
    figure.colorbar(image, label="probability", shrink=0.6, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1])
    save(figure, path)


def draw_heads(model: GPT, tokenizer: CharTokenizer, data: Dataset, text: str, path: Path) -> None:
    """Draw the attention weights of two heads on `text`.

    They are the head that attends most to the latest space or line break, and the head that attends most to line breaks, as
    measured on windows of the validation split.
    """
    from matplotlib import pyplot as plt

    # attention weights on the validation split
    T = model.config.block_size
    positions = np.arange(0, data.tokens["val"] - T, T)[:VAL_WINDOWS]
    idx, _ = data.windows("val", positions, T, tokenizer.vocab_size)  # (B, T)
    weights = attention_weights(model, idx).transpose(1, 2)  # (n_layer, nh, B, T, T)

    # (B, T, T) masks of the keys in question, for each query
    is_newline = torch.tensor([c == "\n" for c in tokenizer.characters])[idx]  # (B, T)
    is_break = torch.tensor([c in "\n " for c in tokenizer.characters])[idx]
    latest = torch.where(is_break, torch.arange(T), -1).cummax(dim=1).values  # (B, T): latest break, seen from each position
    past = torch.ones(T, T, dtype=torch.bool).tril()
    masks = {
        "the latest space or line break": latest[:, :, None] == torch.arange(T),
        "line breaks": is_newline[:, None, :] & past,
    }

    # for each mask, the head with the most attention on it, drawn on `text`
    shown = attention_weights(model, torch.tensor([tokenizer.encode(text)[:T]]))[:, 0]  # (n_layer, nh, t, t)
    t = shown.size(-1)
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.9), layout="constrained")
    for axes, (name, mask) in zip(panels, masks.items(), strict=True):
        has_key = mask.any(dim=-1)  # (B, T): queries with at least one such key
        means = (weights * mask).sum(dim=-1)[:, :, has_key].mean(dim=-1)  # (n_layer, nh)
        uniform = (mask / past.sum(dim=-1, keepdim=True)).sum(dim=-1)[has_key].mean()
        layer, head = divmod(int(means.argmax()), model.config.n_head)
        image = axes.imshow(shown[layer, head].masked_fill(~past[:t, :t], math.nan), cmap="Blues", vmin=0, vmax=1)
        axes.set_facecolor("#e8e8e8")
        axes.text(0.97, 0.93, "masked: the future", transform=axes.transAxes, ha="right", color=GREY)
        label_cells(axes, text[:t])
        axes.set(xlabel="attends to", ylabel="this character")
        measured = f"{means.max():.0%} of its attention (uniform attention: {uniform:.0%})"
        axes.set_title(f"Layer {layer + 1}, head {head + 1} attends to {name}:\n{measured}", fontsize=11)
    figure.colorbar(image, ax=panels, label="attention weight", shrink=0.6)
    save(figure, path)


@torch.no_grad()
def attention_weights(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Return the attention weights of all heads on `idx` (B, T): (n_layer, B, nh, T, T), whose rows sum to 1."""
    model.eval()
    B, T = idx.shape
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x, weights = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(T)), []
    for block in model.transformer.h:
        heads = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, model.config.n_head, -1)
        q, k, _ = heads.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        scores = q @ k.mT / math.sqrt(q.size(-1))
        weights.append(F.softmax(scores.masked_fill(future, -math.inf), dim=-1))
        x = block(x)
    return torch.stack(weights)


def draw_losses(bigram: Path, gpt: Path, vocab_size: int, path: Path) -> None:
    """Draw the losses of two runs against the tokens trained on: training as lines, validation as points."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    axes.axhline(math.log(vocab_size), color=GREY, linestyle=":", linewidth=1)
    label = {"color": GREY, "ha": "right", "va": "bottom", "transform": axes.get_yaxis_transform()}
    axes.text(1, math.log(vocab_size), f"ln {vocab_size}: uniform guess", **label)
    for folder, name, color in ((bigram, "bigram model", BLUE), (gpt, "GPT", ORANGE)):
        rows = [{key: float(value) for key, value in row.items() if value} for row in read_rows(folder / "metrics.csv")]
        steps, evaluations = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
        if not steps or not evaluations:
            raise UserError(f"{folder / 'metrics.csv'} has no losses; train that model again")
        millions, losses = [row["tokens"] / 1e6 for row in steps], [row["loss"] for row in steps]
        axes.plot(millions, losses, color=color, linewidth=1, alpha=0.45)
        millions, losses = [row["tokens"] / 1e6 for row in evaluations], [row["val_loss"] for row in evaluations]
        axes.plot(millions, losses, "o", color=color, markersize=5)
        axes.text(millions[-1], losses[-1], f"   {name}: {losses[-1]:.2f}", color=color, va="center")
    axes.set(xlabel="training tokens, in millions", ylabel="loss (nats per character)")
    axes.set_title("Bigram model and GPT: training loss (lines) and validation loss (points)")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_embeddings(rows: torch.Tensor, characters: Sequence[str], path: Path) -> None:
    """Draw the two principal components of the embeddings `rows` (V, C), each as its character."""
    from matplotlib import pyplot as plt

    centered = rows - rows.mean(dim=0)
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    points = u[:, :2] * s[:2]  # (V, 2)
    share = (s[:2] ** 2).sum() / (s**2).sum()
    kinds = {
        "vowels": (lambda c: c in "aeiou", ORANGE),
        "other small letters": (lambda c: c.islower() and c not in "aeiou", BLUE),
        "capitals": (str.isupper, GREEN),
        "the rest": (lambda c: not c.isalpha(), GREY),
    }
    figure, axes = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
    for name, (belongs, color) in kinds.items():
        axes.plot([], [], "s", color=color, label=name)
        for (x, y), character in zip(points.tolist(), characters, strict=True):
            if belongs(character):
                axes.text(x, y, NAMES.get(character, character), color=color, ha="center", va="center", family="monospace")
    axes.update_datalim(points.numpy())
    axes.margins(0.06)
    axes.autoscale_view()
    axes.legend(frameon=False, fontsize=9)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set_title(f"The GPT's character embeddings: the two components hold {share:.0%} of their variance", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def compare_cases(rows: torch.Tensor, characters: Sequence[str]) -> None:
    """Print how often the embedding closest to "A" - "a" + "b" is that of "B", for all pairs of letters; by cosine."""
    ids = {character: i for i, character in enumerate(characters)}
    letters = [c for c in characters if c.islower() and c.upper() in ids]
    pairs = [(ids[a.upper()], ids[a], ids[b], ids[b.upper()]) for a in letters for b in letters if a != b]
    if pairs:
        A, a, b, B = torch.tensor(pairs).T  # (pairs,) each
        similarity = F.normalize(rows[A] - rows[a] + rows[b], dim=-1) @ F.normalize(rows, dim=-1).T  # (pairs, V)
        right, is_b = ((similarity.argmax(dim=-1) == i).float().mean() for i in (B, b))
        others = similarity.scatter(1, torch.stack((A, a, b), dim=1), -math.inf)
        left_out = (others.argmax(dim=-1) == B).float().mean()
        print(f"A - a + b is closest to B in {right:.0%} of {len(pairs)} pairs of letters, to b in {is_b:.0%}")
        print(f"closest to B, with A, a and b left out: {left_out:.0%}")


def draw_generate(model: GPT, tokenizer: CharTokenizer, start: str, path: Path) -> None:
    """Draw how idx grows in generate(), and the window of it that the model gets: a row for each step."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    steps, block_size = 11, 8
    model.crop_block_size(block_size)
    torch.manual_seed(1337)
    ids = model.generate(torch.tensor([tokenizer.encode(start)]), steps, temperature=0.8)[0].tolist()
    characters = [NAMES.get(character, character) for character in tokenizer.decode(ids)]
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for T in range(1, steps + 1):
        for t, character in enumerate(characters[: T + 1]):
            is_new, is_seen = t == T, t >= T - block_size
            face, color = ("#fbe3d3", ORANGE) if is_new else ("#dbe8f6", BLUE) if is_seen else ("#f4f4f4", "#aaaaaa")
            axes.add_patch(Rectangle((t + 0.3 * is_new, T), 0.92, 0.86, facecolor=face, edgecolor=color, linewidth=0.8))
            axes.text(t + 0.3 * is_new + 0.46, T + 0.45, character, color=color, ha="center", va="center", family="monospace")
        window = min(T, block_size)
        shapes = f"idx (1, {T})".ljust(13) + f"idx_cond (1, {window})   logits (1, {window}, {tokenizer.vocab_size})"
        axes.text(steps + 2, T + 0.45, shapes, va="center", family="monospace", fontsize=9)
    legend = {
        "idx_cond: what the model gets": BLUE,
        "idx_next: drawn from its last logits": ORANGE,
        "out of its context": "#aaaaaa",
    }
    for i, (name, color) in enumerate(legend.items()):
        axes.text(i * 8.2, 0.4, f"■ {name}", color=color, va="center", fontsize=9)
    axes.set(xlim=(-0.1, 24), ylim=(steps + 1.1, -0.1))
    axes.axis("off")
    save(figure, path)


def label_cells(axes: Any, characters: Sequence[str]) -> None:
    """Label the rows and columns of an image with `characters`."""
    names = [NAMES.get(character, character) for character in characters]
    axes.set_xticks(range(len(names)), names, fontsize=8, family="monospace")
    axes.set_yticks(range(len(names)), names, fontsize=8, family="monospace")
    axes.tick_params(length=0)


def save(figure: Any, path: Path) -> None:
    """Write `figure` as a PNG with a palette of 256 colors, half the size of one in true color."""
    from matplotlib import pyplot as plt
    from PIL import Image

    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    plt.close(figure)
    Image.open(png).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    configurator.run(main, Config)
