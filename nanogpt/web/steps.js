// generate() step by step, and the architecture: each with its shapes and its lines of model.py.
"use strict";

// generate(), step by step

const stepIds = () => (isLive ? allIds() : state.prompt.concat(state.written.slice(0, state.cursor)));

function phases() {
  const draws = state.sampling.temperature < 1e-5 ? ["argmax"] : ["temperature", "top-k", "top-p", "draw"];
  return ["idx", "window", "forward", "last position", ...draws, "torch.cat"];
}

// What a step shows: {shapes: [expression, shape], text, code: [function, marks]}, and chips, rows or a picture of the logits.
function describeStep(name, ids) {
  const { block_size, vocab_size: V } = data.config;
  const { temperature, topK, topP } = state.sampling;
  const N = ids.length;
  const T = isGPT ? Math.min(N, block_size) : N;
  const cached = isGPT && N <= block_size; // model.py's KV cache holds the tokens before
  const { choices, scaled, k, kept, p } = distributionAt(isLive ? view.ids.length - 1 : N - 1);
  const kShape = shape(1, topK && topK < V ? k : V);
  const number = (value) => value.toFixed(3);
  const rows = (values, size, format = number) =>
    Array.from({ length: Math.min(8, size) }, (_, i) => [label(choices.ids[i]), values[i], format(values[i])]);

  // a draw of the page has noise that can be shown; look.py's has not
  const isGreedy = temperature < 1e-5;
  const isDrawn = isLive && !isGreedy && ["draw", "torch.cat"].includes(name);
  if (isDrawn) state.noise ??= draw(scaled, kept, random);
  const token = !isLive ? data.written_ids[state.cursor] : choices.ids[isDrawn ? state.noise.best : 0];
  const sums = isDrawn ? Float64Array.from(state.noise.noise, (noise, i) => scaled[i] + noise) : [];
  const sum = (i) => {
    const noise = state.noise.noise[i];
    return [label(choices.ids[i]), sums[i], `${number(scaled[i])} ${noise < 0 ? "−" : "+"} ${number(Math.abs(noise))}`];
  };

  const steps = {
    idx: {
      shapes: ["idx", shape(1, N)],
      text: `The text so far: B = 1 row of ${count(N)} ids. Each turn of the loop makes it one longer.`,
      chips: ids,
      code: ["LanguageModel.stream", []],
    },
    window: {
      shapes: ["idx[:, -block_size:]", shape(1, T)],
      text: windowText(N, block_size),
      chips: ids,
      outside: N - T,
      code: ["LanguageModel.stream", [cached ? "decode" : "window"]],
    },
    forward: {
      shapes: ["logits", shape(1, T, V)],
      text:
        `The model gives V = ${count(V)} logits for each of the T = ${count(T)} positions: what may follow there. To generate, ` +
        `only the last row is needed, and model.py computes no other: its logits are ${shape(1, 1, V)}.`,
      heat: true,
      code: isGPT ? ["GPT.forward", ["lm_head"]] : ["Bigram.forward", ["table"]],
    },
    "last position": {
      shapes: ["logits[:, -1, :]", shape(1, V)],
      text: `The row of the last token, ${label(ids[N - 1])}: one number for each token of the vocabulary.`,
      rows: rows(choices.logits, choices.ids.length),
      code: ["LanguageModel.stream", ["last"]],
    },
    temperature: {
      shapes: ["logits / temperature", shape(1, V)],
      text: `Divided by ${temperature}. ${temperatureText(temperature)}`,
      rows: rows(scaled, choices.ids.length),
      code: ["sample_next", ["scale"]],
    },
    "top-k": {
      shapes: ["logits.topk(k)", kShape],
      text:
        topK && topK < choices.size
          ? `Only the ${count(k)} likeliest stay.`
          : `top-k is ${topK || "off"}: all ${count(choices.size)} tokens stay.`,
      rows: rows(scaled, k),
      code: ["sample_next", ["top_k"]],
    },
    "top-p": {
      shapes: ["softmax", kShape],
      text:
        "softmax makes probabilities of the logits: positive, and 1 in all. " +
        (topP < 1 ? `The likeliest that together have ${topP} stay: ${count(kept)}.` : "top-p is 1: all stay."),
      rows: rows(p, kept, percent),
      code: ["sample_next", ["top_p"]],
    },
    draw: {
      shapes: ["token", shape(1, 1)],
      text:
        "torch.multinomial(probs, 1) would draw from these probabilities. model.py does the same by adding Gumbel noise to the " +
        `logits and taking the largest sum.${isLive ? "" : " look.py drew this one, with its own noise."}`,
      rows: isDrawn ? Array.from(ranked(sums).subarray(0, 8), sum) : rows(p, kept, percent),
      chips: [token],
      isNew: true,
      code: ["sample_next", ["noise", "draw"]],
    },
    argmax: {
      shapes: ["token", shape(1, 1)],
      text: "Temperature 0 is greedy decoding: always the largest logit.",
      rows: rows(choices.logits, choices.ids.length),
      chips: [token],
      isNew: true,
      code: ["sample_next", ["greedy"]],
    },
    "torch.cat": {
      shapes: ["torch.cat((idx, token), dim=1)", shape(1, N + 1)],
      text: "The new token goes to the end of idx, and the loop starts again with one token more.",
      chips: ids.concat(token),
      isNew: true,
      token,
      code: ["LanguageModel.stream", ["cat"]],
    },
  };
  return steps[name];
}

function windowText(N, block_size) {
  if (!isGPT) return "A bigram model has no context: it looks at the last token only, however long idx is.";
  const most = count(block_size);
  if (N > block_size) {
    return (
      `idx is longer than block_size = ${most}, so only its last ${most} ids go in: the window slides, and the first tokens ` +
      "are forgotten."
    );
  }
  return (
    `T = ${count(N)} is the present length, block_size = ${most} the most that the model can see. All of idx still fits. The ` +
    "keys and values of earlier tokens are in the KV cache, so that only what is new has to be computed."
  );
}

function temperatureText(temperature) {
  if (temperature < 1) return "Below 1, differences grow, and the likely gets likelier.";
  return temperature > 1 ? "Above 1, differences shrink, and the unlikely gets its chance." : "1 changes nothing.";
}

function renderStep() {
  const names = phases();
  const name = names[state.phase];
  const ids = stepIds();
  $("phases").replaceChildren(
    ...names.map((other) => el("li", { "aria-current": other === name ? "step" : undefined }, other)),
  );
  const done = !isLive && state.cursor >= state.written.length;
  for (const id of ["step", "step-token", "step-run"]) $(id).disabled = done;
  if (done && state.phase === 0) {
    $("step-view").replaceChildren(el("p", {}, "That was all that look.py wrote."));
    return showCode($("step-code"), "LanguageModel.stream", []);
  }
  const step = describeStep(name, ids);
  const parts = [el("p", { class: "shapes" }, `${step.shapes[0]} `, el("b", {}, step.shapes[1])), el("p", {}, step.text)];
  if (step.chips) {
    const shown = step.chips.slice(-40);
    const hidden = step.chips.length - shown.length;
    const row = el("div", { class: "chips" });
    if (hidden) row.append(el("span", { class: "muted small" }, `… ${count(hidden)} more`));
    shown.forEach((id, i) => {
      const classes = `${step.isNew && i === shown.length - 1 ? "new" : ""} ${hidden + i < (step.outside ?? 0) ? "outside" : ""}`;
      row.append(tokenElement("span", id, classes));
      row.lastChild.append(el("small", {}, String(id)));
    });
    parts.push(row);
  }
  if (step.rows) {
    const values = step.rows.map((row) => row[1]);
    const low = Math.min(0, ...values);
    const high = Math.max(...values) - low || 1;
    parts.push(
      el("ol", { class: "bars" }, ...step.rows.map(([text, value, number]) => bar(text, (value - low) / high, number))),
    );
  }
  if (step.heat && isLive) parts.push(heat());
  $("step-view").replaceChildren(...parts);
  showCode($("step-code"), ...step.code);
}

// The logits (T, V) as a picture, the last row marked.
function heat() {
  const rows = view.model.logits.slice(-64);
  const columns = Math.min(128, tokenizer.size);
  const canvas = el("canvas", {
    role: "img",
    "aria-label": `Logits of the last ${rows.length} positions; the last row is marked`,
  });
  const width = Math.max(2, Math.floor(340 / columns));
  const height = rows.length > 32 ? 4 : 7;
  const ctx = context(canvas, columns * width, rows.length * height + 2);
  rows.forEach((logits, t) => {
    const p = softmax(logits);
    for (let v = 0; v < columns; v++) {
      ctx.fillStyle = shade(0.06 + 0.94 * Math.sqrt(p[v]));
      ctx.fillRect(v * width, t * height, width, height - 1);
    }
  });
  ctx.strokeStyle = color("warm", 1);
  ctx.lineWidth = 2;
  ctx.strokeRect(1, (rows.length - 1) * height - 0.5, columns * width - 2, height + 0.5);
  canvas.style.maxWidth = "100%";
  return canvas;
}

// Go to the next step; return false when there is none.
function step() {
  if (!isLive && state.cursor >= state.written.length) return false;
  const names = phases();
  if (state.phase + 1 < names.length) {
    state.phase++;
    renderStep();
    return true;
  }
  const { token } = describeStep(names.at(-1), stepIds());
  state.noise = null;
  if (isLive) append(token);
  else {
    state.cursor++;
    state.phase = 0;
    renderStep();
  }
  return true;
}

function stepToken() {
  do if (!step()) return false;
  while (state.phase > 0);
  return true;
}

function stepBack() {
  stop();
  state.cursor = state.phase = 0;
  state.noise = null;
  if (isLive && state.written.length) {
    state.written = [];
    update();
  } else renderStep();
}

// lines of model.py

function showCode(place, name, marks) {
  const shown = [name, ...marks].join(" ");
  if (place.dataset.shown === shown) return;
  place.dataset.shown = shown;
  const { line, text, marks: known } = data.source[name];
  const spans = marks.map((mark) => known[mark]).filter(Boolean);
  const isOn = (number) => spans.some(([first, last]) => first <= number && number <= last);
  const rows = text
    .replace(/\n$/, "")
    .split("\n")
    .map((row, i) =>
      el("span", { class: `l${isOn(line + i) ? " on" : ""}` }, el("i", { "aria-hidden": true }, String(line + i)), row || " "),
    );
  const pre = el("pre", { tabindex: 0, "aria-label": `${name} in model.py` }, ...rows);
  place.replaceChildren(el("p", {}, `model.py, line ${spans.length ? spans[0][0] : line}: ${name}`), pre);
  const first = pre.querySelector(".on");
  if (first) pre.scrollTop = first.offsetTop - pre.offsetTop - 70;
}

// architecture

function parts() {
  const { n_layer: L, n_head, n_embd: C, block_size, vocab_size: V, bias, gelu } = data.config;
  const hs = C / n_head;
  const T = view.ids.length;
  const x = `(B, T, C) = ${shape(1, T, C)}`;
  const last = `(B, V) = ${shape(1, V)}`;
  const ids = {
    id: "idx",
    name: "idx",
    out: `(B, T) = ${shape(1, T)}`,
    text: "The ids of the tokens: B texts of T tokens. Here B is 1.",
    code: [isGPT ? "GPT.forward" : "Bigram.forward", []],
  };
  const sample = {
    id: "sample",
    name: "sample the next token",
    in: last,
    out: "(B, 1)",
    text: "To generate, from the last position: temperature, top-k, top-p, softmax and a draw.",
    code: ["sample_next", ["draw"]],
  };
  if (!isGPT) {
    const table = {
      id: "table",
      name: "token_embedding_table",
      weights: /./,
      in: ids.out,
      out: `(B, T, V) = ${shape(1, T, V)}`,
      text: "Row i of the table holds the logits of what follows token i. That is the whole model.",
      code: ["Bigram.forward", ["table"]],
    };
    return [ids, table, sample];
  }
  const norm =
    "Layer normalization: each position minus its mean, divided by its standard deviation, times a weight" +
    `${bias ? ", plus a bias" : ""}.`;
  const block = (id, name, more) => ({ id, name, block: true, in: x, out: x, ...more });
  return [
    ids,
    {
      id: "wte",
      name: "token embedding",
      weights: /^transformer\.wte/,
      in: ids.out,
      out: x,
      text:
        `A table: one vector of C = ${count(C)} numbers for each of the V = ${count(V)} tokens. The output head uses the same ` +
        "table.",
      code: ["GPT.forward", ["embed"]],
    },
    {
      id: "wpe",
      name: "+ position embedding",
      weights: /^transformer\.wpe/,
      in: `positions 0 to ${T - 1}`,
      out: x,
      text: `A second table, one vector for each of the block_size = ${count(block_size)} positions. The two are added.`,
      code: ["GPT.forward", ["embed"]],
    },
    block("ln_1", "LayerNorm ln_1", { weights: /\.ln_1\./, text: norm, code: ["Block.forward", ["attn"]] }),
    block("attn", "causal self-attention", {
      weights: /\.attn\./,
      text:
        "Each position asks with its query, and takes the values of the positions up to itself whose keys fit: " +
        `${n_head} heads with ${hs} channels each; q, k and v are ${shape(1, n_head, T, hs)}, the weights ` +
        `${shape(1, n_head, T, T)}.`,
      code: ["CausalSelfAttention.forward", ["qkv", "attend", "proj"]],
    }),
    block("add_1", "+", {
      round: true,
      text: "The result is added to x: the residual stream.",
      code: ["Block.forward", ["add"]],
    }),
    block("ln_2", "LayerNorm ln_2", { weights: /\.ln_2\./, text: norm, code: ["Block.forward", ["mlp"]] }),
    block("mlp", "MLP", {
      weights: /\.mlp\./,
      text:
        `For each position alone: from ${count(C)} channels to ${count(4 * C)}, GELU ` +
        `(${gelu === "tanh" ? "its tanh approximation" : "exact"}), and back.`,
      code: ["MLP.forward", ["mlp"]],
    }),
    block("add_2", "+", {
      round: true,
      text: "Added to x again. The next block starts from here.",
      code: ["Block.forward", ["mlp"]],
    }),
    {
      id: "ln_f",
      name: "LayerNorm ln_f",
      weights: /\.ln_f\./,
      in: x,
      out: x,
      text: `${norm} The last one, before the head.`,
      code: ["GPT.forward", ["ln_f"]],
    },
    {
      id: "lm_head",
      name: "output head lm_head",
      tied: true,
      in: x,
      out: `(B, T, V) = ${shape(1, T, V)}`,
      text:
        "The dot product with each token's embedding gives its logit. The matrix is that of the token embedding (tied), so " +
        "that it adds no parameters.",
      code: ["GPT.forward", ["lm_head"]],
    },
    {
      id: "loss",
      name: "loss, with targets",
      in: "logits (B, T, V), targets (B, T)",
      out: "one number",
      text:
        "In training, cross-entropy compares the logits with the targets, idx shifted by one. Without targets there is no " +
        "loss: forward returns (logits, None).",
      code: ["GPT.forward", ["returns"]],
    },
    sample,
  ];
}

const sizeOf = (sizes) => sizes.reduce((product, size) => product * size, 1);
const totalParameters = Object.values(data.parameters).reduce((sum, sizes) => sum + sizeOf(sizes), 0);
const weightsOf = (part) => (part.weights ? Object.entries(data.parameters).filter(([name]) => part.weights.test(name)) : []);
const parametersOf = (part) => weightsOf(part).reduce((sum, [, sizes]) => sum + sizeOf(sizes), 0);

function renderArchitecture() {
  const diagram = $("diagram");
  const all = parts();
  const L = data.config.n_layer;
  let block = null;
  let branch = null; // a branch: what is added to the residual stream, the line beside it
  for (const part of all) {
    const number = part.block ? parametersOf(part) / L : parametersOf(part);
    const about = part.tied ? "tied" : number ? count(number) : "";
    const button = el(
      "button",
      {
        type: "button",
        class: `part${part.round ? " round" : ""}`,
        "data-part": part.id,
        "aria-pressed": false,
        onclick: () => showPart(part.id),
      },
      part.name,
      el("small", {}, about),
    );
    if (part.block && !block) {
      block = el(
        "div",
        { class: "block", role: "group", "aria-label": `Block, ${L} of them` },
        el("p", {}, `${count(L)} blocks like this one, each with its own weights`),
      );
      diagram.append(el("span", { class: "flow" }, "x (B, T, C)"), block);
    } else if (!part.block && part !== all[0] && part.id !== "wpe") {
      const flow = {
        ln_f: "x (B, T, C)",
        lm_head: "x (B, T, C)",
        loss: "logits (B, T, V)",
        sample: "or logits[:, -1, :] (B, V)",
        table: "(B, T)",
        wte: "(B, T)",
      }[part.id];
      diagram.append(el("span", { class: "flow" }, part.id === "sample" && !isGPT ? "logits[:, -1, :] (B, V)" : flow));
    }
    if (part.block) {
      if (part.id.startsWith("ln_")) {
        if (branch) block.append(el("span", { class: "flow" }, " "));
        block.append((branch = el("div", { class: "branch" })));
      } else branch.append(el("span", { class: "flow" }, " "));
      branch.append(button);
    } else diagram.append(button);
  }
  showPart(isGPT ? "attn" : "table");
}

function showPart(id) {
  state.part = id;
  renderPart();
}

function renderPart() {
  if (!state.part) return;
  const part = parts().find((other) => other.id === state.part);
  const L = data.config.n_layer;
  for (const button of $("diagram").querySelectorAll(".part"))
    button.setAttribute("aria-pressed", button.dataset.part === state.part);
  const weights = weightsOf(part).filter(([name]) => !part.block || name.startsWith("transformer.h.0."));
  const number = parametersOf(part);
  const share = percent(number / totalParameters);
  const facts = [
    ...(part.in ? [["in", part.in]] : []),
    ["out", part.out],
    ...weights.map(([name, sizes]) => [
      name.replace(/^transformer\.h\.0\./, "").replace(/^transformer\./, ""),
      shape(...sizes),
    ]),
    ...(number
      ? [
          [
            "parameters",
            part.block ? `${count(number / L)} × ${L} blocks = ${count(number)} (${share})` : `${count(number)} (${share})`,
          ],
        ]
      : []),
  ];
  $("part").replaceChildren(
    el("h3", { style: "margin-top: 0" }, part.name),
    el("p", {}, part.text),
    el(
      "table",
      { class: "facts" },
      el("tbody", {}, ...facts.map(([key, value]) => el("tr", {}, el("td", {}, key), el("td", {}, value)))),
    ),
  );
  showCode($("part-code"), ...part.code);
}
