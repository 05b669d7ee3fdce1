"""Scaling laws: the loss of N parameters after D tokens, and the N and D that make the most of a budget of FLOPs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import GPTConfig
from nanogpt import curves, sizing
from nanogpt.errors import UserError
from nanogpt.sizing import FLOPS_PER_PARAMETER_AND_TOKEN

Number = float | np.ndarray


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token: approach 3 of Hoffmann et al. 2022 ("Chinchilla")."""

    source: str
    E: float  # loss of an infinite model after infinitely many tokens: the entropy of text
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: Number, D: Number) -> Number:
        """Return the loss of a model with N parameters after D tokens."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def optimum(self, flops: Number) -> tuple[Number, Number]:
        """Return the N and D with the lowest loss among those with 6ND = `flops` (the paper's equation 4)."""
        a, b = self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        ND = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        return G * ND**a, ND**b / G

    def optimal_tokens(self, N: Number) -> Number:
        """Return the D for which N is the optimum of its budget, 6ND."""
        N_1, D_1 = self.optimum(FLOPS_PER_PARAMETER_AND_TOKEN)  # ND = 1
        return D_1 * (N / N_1) ** (self.alpha / self.beta)


HOFFMANN = Law("Hoffmann et al. 2022", 1.69, 406.4, 410.7, 0.34, 0.28)  # appendix D.3
BESIROGLU = Law("Besiroglu et al. 2024", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # a new fit to the data of the former
# (N, compute-optimal D) by approach 2, the minima of parabolas at fixed FLOPs: table A3 of Hoffmann et al. 2022
APPROACH_2 = np.array(
    [
        (400e6, 7.7e9),
        (1e9, 20.0e9),
        (10e9, 219.5e9),
        (67e9, 1.7e12),
        (175e9, 4.3e12),
        (280e9, 7.1e12),
        (520e9, 13.4e12),
        (1e12, 26.5e12),
        (10e12, 292.0e12),
    ]
)
# (layers, channels, heads) of the models in table A4 of Hoffmann et al. 2022: sequences of 2,048, about 32,000 tokens
CHINCHILLA_MODELS = [(10, 640, 10), (20, 1024, 16), (24, 1280, 10), (26, 1792, 14), (28, 2048, 16), (40, 3584, 28)]


def approach_2_tokens(N: float) -> float:
    """Return the compute-optimal number of tokens for N parameters, from a line through APPROACH_2's logarithms."""
    return float(10 ** np.polyval(np.polyfit(*np.log10(APPROACH_2).T, 1), np.log10(N)))


def chinchilla_cost(n_layer: int, n_embd: int, n_head: int, block_size: int = 2048) -> tuple[int, int, float]:
    """Return N of a Chinchilla model, its FLOPs of training on one sequence by the paper's appendix F, and FLOPs / 6ND.

    The models are GPTs with relative positions: another (C, C) matrix and two (C,) biases in each layer. N is without input
    embeddings; the FLOPs are without embeddings and logits, which reproduces table A4, and with 3 per softmax entry.
    """
    model = sizing.empty_model(GPTConfig(block_size, 32_000, n_layer, n_head, n_embd))
    flops = sizing.forward_flops(model)
    forward = sum(flops.values()) - flops["head"] + n_layer * 3 * n_head * block_size**2
    N = model.get_num_params() + n_layer * (n_embd**2 + 2 * n_embd)
    return N, 3 * forward, 3 * forward / (FLOPS_PER_PARAMETER_AND_TOKEN * N * block_size)


def report(name: str, shape: GPTConfig, tokens: float, out: Path) -> dict[str, Any]:
    """Print what the laws say of budgets, of a model after `tokens` and of the paper's models; draw the curves to `out`.

    0 `tokens` are 20 per parameter. Returns the main figures. Raises UserError if `out` cannot be written.
    """
    # the optimum of each budget
    laws = (HOFFMANN, BESIROGLU)
    print("compute-optimal parameters N, tokens D and loss, by L(N, D) = E + A / N^alpha + B / D^beta")
    print("  6ND FLOPs" + "".join(f"  {law.source:>34}" for law in laws))
    for exponent in range(18, 26):
        optima = [(*law.optimum(10.0**exponent), law) for law in laws]
        cells = (f"  {N / 1e9:>10,.3f}B {D / 1e9:>12,.2f}B {law.loss(N, D):>8.3f}" for N, D, law in optima)
        print(f"  1e{exponent}     " + "".join(cells))

    # the model
    N = sizing.empty_model(shape).get_num_params(non_embedding=False)
    D = tokens or sizing.TOKENS_PER_PARAMETER * N
    optimal = {law.source: law.optimal_tokens(N) for law in laws} | {"approach 2": approach_2_tokens(N)}
    print(f"{name}: {N / 1e6:,.1f}M parameters")
    print("  compute-optimal: " + ", ".join(f"{count / 1e9:,.2f}B tokens ({source})" for source, count in optimal.items()))
    losses = ", ".join(f"{law.loss(N, D):.3f} ({law.source})" for law in laws)
    print(f"  loss after {D / 1e9:,.2f}B tokens: {losses}")

    # the paper's models
    print("models in table A4 of Hoffmann et al. 2022: N, FLOPs of training on a sequence, and these relative to 6ND")
    for n_layer, n_embd, n_head in CHINCHILLA_MODELS:
        count, flops, ratio = chinchilla_cost(n_layer, n_embd, n_head)
        print(f"  {n_layer} layers, {n_embd:>5,} channels {count / 1e6:>10,.1f}M {flops:>22,} {ratio:>6.3f}")

    try:
        draw(out, name, N, D)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    print(f"curves in {out}")
    return {"parameters": N, "tokens": D, "optimal_tokens": optimal}


def draw(path: Path, name: str, N: float, D: float) -> None:
    """Draw the loss over N and D, and over N at fixed FLOPs, to a PNG or SVG file; a star marks the model `name`."""
    curves.write_figure(path, lambda figure: _fill(figure, name, N, D), inches=(11, 5.2))


def _fill(figure: Any, name: str, N: float, D: float) -> None:
    """Draw both panels into a matplotlib Figure."""
    left, right = figure.subplots(1, 2)
    blue, orange, green = curves.COLORS[:3]
    sizes = np.geomspace(min(1e7, N / 3), max(1e12, 3 * N), 200)
    tokens = np.geomspace(min(1e8, D / 3), max(1e13, 3 * D), 200)
    left.set(xscale="log", yscale="log", xlabel="tokens D", ylabel="parameters N")
    left.set(xlim=tokens[[0, -1]], ylim=sizes[[0, -1]])
    right.set(xscale="log", ylim=(1.8, 5), xlabel="parameters N", ylabel="loss (nats per token)")
    left.set_title("loss by Hoffmann et al. 2022; dotted: 6ND FLOPs", loc="left")
    right.set_title("loss at a fixed budget", loc="left")

    # loss over tokens and parameters
    levels, label_N = np.array([2.0, 2.1, 2.2, 2.4, 2.6, 3.0, 3.5, 4.0]), 3e11
    contours = left.contour(tokens, sizes, HOFFMANN.loss(sizes[:, None], tokens), levels, colors="#aaaaaa", linewidths=1)
    label_D = (HOFFMANN.B / (levels - HOFFMANN.loss(label_N, np.inf))) ** (1 / HOFFMANN.beta)
    left.clabel(contours, fontsize=9, colors="#555555", manual=[(D_, label_N) for D_ in label_D])

    # budgets: lines on the left, curves on the right, with their optimum
    for exponent in (18, 20, 22, 24):
        ND = 10.0**exponent / FLOPS_PER_PARAMETER_AND_TOKEN
        left.plot(tokens, ND / tokens, color="#888888", linewidth=0.9, linestyle=":")
        text = {"color": "#555555", "fontsize": 9, "ha": "center"}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        left.text(16 * ND**0.5, ND**0.5 / 16, f"$10^{{{exponent}}}$", va="center", bbox=box, **text)
        right.plot(sizes, HOFFMANN.loss(sizes, ND / sizes), color=blue)
        best = HOFFMANN.optimum(10.0**exponent)
        ring = best[0], HOFFMANN.loss(*best)
        right.plot(*ring, **curves.RING, color=blue)
        right.annotate(f"$10^{{{exponent}}}$ FLOPs", ring, (0, 10), textcoords="offset points", **text)

    # optima, and the model
    for law, color in ((HOFFMANN, blue), (BESIROGLU, orange)):
        best_N, best_D = law.optimum(np.logspace(8, 28, 50))
        left.plot(best_D, best_N, color=color, linewidth=2, label=f"optimum: {law.source}, approach 3")
    left.plot(*APPROACH_2.T[::-1], "o", color=green, markersize=5, label="Hoffmann et al. 2022, approach 2")
    left.plot(D, N, "*", color="black", markersize=13, label=name)
    for entry in figure.legend(loc="outside lower center", ncols=4, fontsize=9).get_texts():
        entry.set_parse_math(False)  # a name may contain dollar signs
