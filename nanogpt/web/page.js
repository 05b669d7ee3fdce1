// The page: what it shows, and what follows from a click or a key. Text from a model is data: it only ever becomes a text node.
"use strict";

const BARS = 16; // likeliest tokens shown
const SURPRISE_BITS = 8; // full colour
const SHOWN_TOKENS = 200; // of a long text, the last ones
const SHOWN_ATTENTION = 256; // positions, the last ones
const LENS_PRODUCTS = 1e8; // for the table of all positions, of which a larger model shows fewer
const MAP_LABELS = 130; // with more tokens, only some of a map have labels
const WORDS = 600; // to calculate with
const SMALL_VOCABULARY = 300; // with no more tokens, all of them
const WRITE_AT_ONCE = 2000; // tokens of "Keep writing"
const ANALOGIES = [[" king", " man", " woman"], ["a", "A", "B"]];

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const mono = getComputedStyle($("text")).fontFamily;
const isGPT = data.kind === "gpt";

// elements

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== ""));
  return element;
}

// A colour of page.css as [red, green, blue], or as a string with this opacity. Asking the browser is slow: once for each theme.
const palette = new Map();
function color(name, alpha = null) {
  if (!palette.has(name)) {
    const probe = el("span");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    palette.set(name, getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number));
    probe.remove();
  }
  return alpha === null ? palette.get(name) : `rgb(${palette.get(name).join(" ")} / ${alpha.toFixed(3)})`;
}

// The accent colour with this opacity, in steps of a hundredth.
function shade(alpha) {
  const percent = Math.round(100 * alpha);
  if (!palette.has(percent)) palette.set(percent, color("accent", percent / 100));
  return palette.get(percent);
}

// The width that an element has, in CSS pixels; asking makes the browser lay out the page: once for each width of the window.
const widths = new Map();
function widthOf(element, most) {
  if (!widths.has(element)) widths.set(element, element.clientWidth);
  return Math.min(most, widths.get(element) || most);
}

// Set the size of a canvas in CSS pixels and return its context, sharp on every screen.
function context(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  return ctx;
}

const count = (n) => n.toLocaleString("en-US");
const shape = (...sizes) => `(${sizes.map((size) => (typeof size === "number" ? count(size) : size)).join(", ")})`;

function percent(p) {
  if (p === 0) return "0 %";
  if (p < 1e-5) return `${(100 * p).toExponential(1)} %`;
  return `${(100 * p).toPrecision(p > 0.9995 ? 4 : 3)} %`.replace(/(\.\d*?)0+ %$/, "$1 %").replace(". %", " %");
}

// arrays from nanogpt/page.py

function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, int16: Int16Array, uint32: Uint32Array, float32: Float32Array };
  const array = packed.dtype === "float16" ? halves(new Uint16Array(bytes.buffer)) : new kinds[packed.dtype](bytes.buffer);
  array.shape = packed.shape;
  return array;
}

// float16 to float32
function halves(bits) {
  return Float32Array.from(bits, (half) => {
    const sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
    return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
  });
}

function readTokens({ ids, lengths, bytes }) {
  const found = new Map(), all = unpack(bytes), sizes = unpack(lengths);
  let start = 0;
  unpack(ids).forEach((id, i) => {
    found.set(id, all.subarray(start, start + sizes[i]));
    start += sizes[i];
  });
  return found;
}

// where the numbers come from: a model in the page, or a text computed beforehand

class Live {
  constructor() {
    const weights = Object.fromEntries(Object.entries(data.weights).map(([name, packed]) => [name, unpack(packed)]));
    this.model = new (isGPT ? GPT : Bigram)(data.config, weights, tokenizer.size);
    this.lenses = new Map(); // "layer token position" -> likeliest tokens, as long as the text before is the same
  }

  update(ids) {
    const before = this.model.ids;
    this.model.forward(ids);
    this.ids = this.model.ids;
    this.start = ids.length - this.ids.length;
    let same = 0;
    while (same < this.ids.length && this.ids[same] === before[same]) same++;
    for (const key of this.lenses.keys()) if (Number(key.split(" ")[1]) >= same) this.lenses.delete(key);
  }

  logprob(t) {
    const logits = this.model.logits[t - 1];
    return logits[this.ids[t]] - logSumExp(logits);
  }

  choices(t) {
    const logits = this.model.logits[t], ids = ranked(logits);
    return { ids, logits: Float64Array.from(ids, (id) => logits[id]), size: ids.length, rest: () => -Infinity };
  }

  lens(layer, t) {
    const key = `${layer} ${t}`;
    if (!this.lenses.has(key)) this.lenses.set(key, this.model.lens(layer, t, 5));
    return this.lenses.get(key);
  }

  attention = (layer, head, query) => this.model.attention(layer, head, query);
  norm = (layer, t) => this.model.norm(layer, t);
}

class Recorded {
  constructor() {
    for (const [name, value] of Object.entries(data.recorded)) this[`_${name}`] = value?.dtype ? unpack(value) : value;
    this.start = 0;
  }

  update(ids) {
    this.ids = ids;
  }

  logprob(t) {
    return this._logprobs[t - 1];
  }

  choices(t) {
    const size = this._choices.shape[1], stops = this._rest.shape[1];
    return {
      ids: this._choices.subarray(t * size, (t + 1) * size),
      logits: Float64Array.from(this._top.subarray(t * size, (t + 1) * size)),
      size: tokenizer.size,
      rest: (temperature) => this._rest[t * stops + Math.round(temperature * 20) - 1],
    };
  }

  lens(layer, t) {
    const [, T, size] = this._lens.shape, first = (layer * T + t) * size;
    return Array.from({ length: size }, (_, i) => ({ id: this._lens_ids[first + i], p: this._lens[first + i] }));
  }

  attention(layer, head, query) {
    const [, heads, cells] = this._attention.shape, row = (layer * heads + head) * cells + (query * (query + 1)) / 2;
    return Float32Array.from(this._attention.subarray(row, row + query + 1), (weight) => weight / 65535);
  }

  norm(layer, t) {
    return this._norms[layer * this._norms.shape[1] + t];
  }
}

const tokenBytes = readTokens(data.tokens);
if (data.tokenizer.merges) data.tokenizer.merges = unpack(data.tokenizer.merges);
const tokenizer = new Tokenizer(data.tokenizer, tokenBytes);
const view = data.weights ? new Live() : new Recorded();
const isLive = view instanceof Live;
const random = generator(data.sampling.seed);

const state = {
  prompt: data.prompt_ids,
  written: data.written_ids,
  chosen: 0, // index in the text
  layer: 0,
  head: 0,
  near: null, // token of the map that was clicked; null: the chosen one
  sampling: { temperature: data.sampling.temperature, topK: data.sampling.top_k, topP: data.sampling.top_p },
  chat: Boolean(data.chat?.on),
  phase: 0, // of generate()
  cursor: 0, // tokens that a recorded generate() has written
  noise: null,
  part: "",
  timer: 0,
};
const allIds = () => state.prompt.concat(state.written);

// A token as a person can read it: visible spaces and line breaks, bytes that are no text as \x.., invisible characters by number.
const labels = new Map();
function label(id) {
  if (!labels.has(id)) {
    const bytes = tokenBytes.get(id) ?? new Uint8Array();
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
      text = text.replaceAll("\r", "␍").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
      text = text.replace(/[\p{C}\p{Z}]/gu, (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
      text = text.replace(/^(?=\p{M})/u, "◌");
    } catch {
      text = hex(bytes).map((byte) => `\\x${byte}`).join("");
    }
    labels.set(id, text || "∅");
  }
  return labels.get(id);
}
const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0"));
const endsLine = (id) => tokenBytes.get(id)?.at(-1) === 10;

// the text

function encode(text) {
  if (!state.chat) return tokenizer.encode(text);
  const { opening, user, lead, user_end, assistant } = data.chat;
  const parts = [tokenizer.encode(user), tokenizer.encode(lead + text, true), tokenizer.encode(user_end + assistant)];
  return { ids: [...opening, ...parts.flatMap((part) => part.ids)], missing: parts[1].missing };
}

function typed() {
  stop();
  const { ids, missing } = encode($("text").value);
  state.prompt = ids.length ? ids : data.empty_ids;
  state.written = [];
  note(missing && (tokenizer.kind === "ids"
    ? `These tokens have no text: write ids below ${count(tokenizer.size)}, got ${JSON.stringify(missing)}`
    : `${JSON.stringify(missing)} is left out: it is not among the ${data.tokenizer_name} of this model.`));
  update();
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

// Everything follows from the ids: run the model on what is new, then draw.
function update(chosen = allIds().length - 1) {
  view.update(allIds());
  state.chosen = chosen;
  state.phase = 0;
  state.near = null;
  renderTokens();
  renderChosen();
  renderStep();
  renderPart();
}

function choose(index, focus = false) {
  const last = allIds().length - 1;
  state.chosen = Math.max(view.start, Math.min(index, last));
  state.near = null;
  for (const token of $("tokens").querySelectorAll(".token")) {
    const isChosen = Number(token.dataset.index) === state.chosen;
    token.setAttribute("aria-selected", isChosen);
    token.tabIndex = isChosen ? 0 : -1;
    if (isChosen && focus) token.focus();
  }
  renderChosen();
}

function renderChosen() {
  renderDetail();
  renderNext();
  if (isGPT) {
    renderAttention();
    renderLens();
    renderEmbeddings();
  } else renderTable();
}

function tokenElement(tag, id, classes = "", attributes = {}) {
  const special = tokenizer.specialIds.has(id) ? " special" : "";
  return el(tag, { class: `token${special} ${classes}`.trim(), ...attributes }, label(id));
}

function bits(index) {
  const t = index - view.start;
  return t > 0 ? -view.logprob(t) / Math.LN2 : null;
}

function renderTokens() {
  const ids = allIds(), first = Math.max(0, Math.min(ids.length - SHOWN_TOKENS, view.start)), row = $("tokens");
  let total = 0;
  row.replaceChildren(...(first ? [el("span", { class: "muted small" }, `… ${count(first)} tokens before`)] : []));
  for (let index = first; index < ids.length; index++) {
    const id = ids[index], surprise = index > view.start ? bits(index) : null;
    const classes = (index >= state.prompt.length ? "written" : "") + (index < view.start ? " outside" : "");
    const attributes = { role: "option", "data-index": index, "aria-selected": index === state.chosen };
    attributes.tabindex = index === state.chosen ? 0 : -1;
    attributes["aria-label"] = `${label(id)}, id ${id}`;
    if (index < view.start) attributes["aria-disabled"] = true;
    if (surprise !== null) {
      total += surprise;
      attributes["--heat"] = Math.min(100, (100 * surprise) / SURPRISE_BITS);
      attributes["aria-label"] += `, surprise ${surprise.toFixed(1)} bits`;
    }
    const token = tokenElement("div", id, classes, attributes);
    token.append(el("small", { "aria-hidden": true }, String(id)));
    row.append(token);
    if (endsLine(id) && index + 1 < ids.length) row.append(el("span", { class: "break", role: "presentation" }));
  }
  row.scrollTop = row.scrollHeight;
  $("legend-outside").hidden = view.start === 0;
  $("clear").disabled = !isLive || !state.written.length;
  const predicted = view.ids.length - 1, nats = (total / predicted) * Math.LN2;
  $("loss").textContent = predicted
    ? `Mean surprise of this text: ${(total / predicted).toFixed(2)} bits a token. In nats that is its loss, ${nats.toFixed(3)}` +
      ` (cross-entropy); perplexity ${Math.exp(nats).toFixed(1)}.`
    : "";
}

function renderDetail() {
  const index = state.chosen, id = allIds()[index], bytes = tokenBytes.get(id) ?? [], surprise = bits(index);
  const name = tokenizer.specialIds.has(id) ? "special token" : "token";
  const facts = {
    [name]: label(id),
    position: `${index - view.start} (0 to ${view.ids.length - 1})`,
    id: String(id),
    bytes: hex(bytes).join(" "),
    probability: surprise === null ? "nothing before it" : percent(2 ** -surprise),
    surprise: surprise === null ? "–" : `${surprise.toFixed(2)} bits`,
  };
  $("detail").replaceChildren(...Object.entries(facts).map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))));
  $("chosen").replaceChildren(`token ${index + 1} of ${allIds().length} `, tokenElement("span", id), ` id ${id}`);
  $("previous").disabled = index <= view.start;
  $("next").disabled = index >= allIds().length - 1;
}

// the next token

function distributionAt(t) {
  const choices = view.choices(t), { temperature, topK, topP } = state.sampling;
  return { choices, ...distribution(choices, temperature, topK, topP) };
}

function bar(name, share, number, { classes = "", ghost = null, onclick = null, label: title = "" } = {}) {
  const track = el("span", { class: "track", "aria-hidden": true }, el("span", { class: "fill" }));
  track.firstChild.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  if (ghost !== null) {
    track.append(el("span", { class: "ghost" }));
    track.lastChild.style.width = `${100 * Math.min(1, ghost)}%`;
  }
  const text = onclick ? el("button", { type: "button", class: "name", onclick, "aria-label": title || name }, name) : el("span", { class: "name" }, name);
  return el("li", { class: classes }, text, track, el("span", { class: "number" }, number));
}

function renderNext() {
  const t = state.chosen - view.start, found = distributionAt(t), { choices, k, kept, p, rest } = found;
  const next = allIds()[state.chosen + 1], written = state.chosen + 1 >= state.prompt.length;
  const plain = distribution(choices, 1, 0, 0).p;
  const shown = Array.from({ length: Math.min(BARS, choices.ids.length) }, (_, i) => i);
  const place = next === undefined ? -1 : choices.ids.indexOf(next);
  if (place >= BARS) shown.push(place);
  const scale = Math.max(p[0], plain[0]);
  const rows = shown.map((i) => {
    const id = choices.ids[i], isNext = id === next, share = i < kept ? p[i] : 0;
    const item = bar(label(id), share / scale, i < kept ? percent(share) : "cut off", {
      classes: `${i < kept ? "" : "cut"} ${isNext ? "next" : ""}`,
      ghost: plain[i] / scale,
    });
    item.dataset.id = id;
    item.dataset.p = share;
    item.dataset.plain = plain[i];
    if (isNext) item.title = written ? "drawn" : "next in the text";
    return item;
  });
  if (rest) rows.push(bar(`other ${count(choices.size - choices.ids.length)}`, rest / scale, percent(rest), { classes: "rest" }));
  $("bars").replaceChildren(...rows);
  const mass = plain.subarray(0, kept).reduce((sum, value) => sum + value, 0);
  const size = rest ? choices.size : kept;
  const how = state.sampling.temperature < 1e-5 ? "Greedy: always the likeliest." : `The draw is among ${count(size)} of ${count(choices.size)} tokens, which hold ${percent(rest ? 1 : mass)} of the model's own probability.`;
  $("kept").textContent = `${how} The orange mark is the model's own probability, before the sliders.` +
    (next === undefined ? "" : ` Underlined: what ${written ? "was drawn" : "follows in the text"}.`);
  $("kept").dataset.kept = kept;
  $("kept").dataset.k = k;
}

function setSliders() {
  const most = Math.min(isLive ? tokenizer.size : view._choices.shape[1], 256);
  const specs = { temperature: [0, 2, 0.05, "temperature"], top_k: [0, most, 1, "topK"], top_p: [0.05, 1, 0.05, "topP"] };
  for (const [id, [min, max, step, key]] of Object.entries(specs)) {
    const input = $(id);
    Object.assign(input, { min, max, step });
    const show = () => {
      const value = state.sampling[key];
      $(`${id}-out`).textContent = id === "top_k" ? (value === 0 || value >= tokenizer.size ? "all" : value) : value === 0 ? "0 (greedy)" : value;
    };
    input.value = state.sampling[key];
    state.sampling[key] = Number(input.value); // the nearest stop of the slider
    input.addEventListener("input", () => {
      state.sampling[key] = Number(input.value);
      show();
      state.phase = 0;
      renderNext();
      renderStep();
    });
    show();
  }
}

// Draw the next token at the end of the text.
function drawNext() {
  const found = distributionAt(view.ids.length - 1);
  return found.choices.ids[draw(found.scaled, found.kept, random).best];
}

function append(id) {
  state.written = state.written.concat(id);
  update();
}

function stop() {
  clearTimeout(state.timer);
  state.timer = 0;
  $("run").textContent = "Keep writing";
  $("step-run").textContent = "Run";
}

function repeat(button, name, turn) {
  if (state.timer) return stop();
  button.textContent = "Stop";
  let turns = 0;
  const again = () => {
    if (++turns > WRITE_AT_ONCE || !turn()) return stop();
    state.timer = setTimeout(again, name === "run" ? 30 : 350);
  };
  state.timer = setTimeout(again, 0);
}

function writeOne() {
  append(drawNext());
  const ends = state.chat && tokenizer.decode(state.written).includes(data.chat.stop);
  return !ends && !(data.empty_ids.length === 1 && tokenizer.specialIds.has(state.written.at(-1)));
}

// the bigram model as its table

const counts = data.counts ? unpack(data.counts) : null;
const cell = { row: 0, column: 0 };

function renderTable() {
  cell.row = allIds()[state.chosen];
  cell.column = allIds()[state.chosen + 1] ?? view.choices(state.chosen).ids[0];
  drawTable();
}

const probabilities = new Map();
function tableRow(id) {
  if (!probabilities.has(id)) {
    const V = data.config.vocab_size;
    probabilities.set(id, softmax(view.model.token_embedding_table.subarray(id * V, id * V + tokenizer.size)));
  }
  return probabilities.get(id);
}

// The table in its colours, drawn once for each theme.
let table = null;
function tableCanvas(size) {
  if (table) return table;
  const V = tokenizer.size, ctx = context((table = el("canvas")), V * size, V * size);
  for (let row = 0; row < V; row++) {
    const p = tableRow(row), total = counts ? totalOf(row) : 0;
    for (let column = 0; column < V; column++) {
      const share = total ? counts[row * V + column] / total : p[column];
      if (share < 0.0005) continue;
      ctx.fillStyle = shade(Math.sqrt(share));
      ctx.fillRect(column * size, row * size, size, size);
    }
  }
  return table;
}

const totalOf = (row) => counts.subarray(row * tokenizer.size, (row + 1) * tokenizer.size).reduce((a, b) => a + b, 0);

function drawTable() {
  const V = tokenizer.size, size = V <= 120 ? 11 : Math.max(1, Math.floor(1000 / V)), margin = V <= 120 ? 18 : 0;
  const { row, column } = cell, ctx = context($("table"), margin + V * size, margin + V * size);
  ctx.drawImage(tableCanvas(size), margin, margin, V * size, V * size);
  ctx.font = `${size - 1}px ${mono}`;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  for (let id = 0; margin && id < V; id++) {
    ctx.fillStyle = color(id === row ? "accent" : "muted", 1);
    ctx.fillText(label(id).slice(0, 1), margin / 2, margin + (id + 0.5) * size);
    ctx.fillStyle = color(id === column ? "accent" : "muted", 1);
    ctx.fillText(label(id).slice(0, 1), margin + (id + 0.5) * size, margin / 2);
  }
  ctx.strokeStyle = color("warm", 1);
  ctx.strokeRect(margin, margin + row * size, V * size, size);
  ctx.lineWidth = 2;
  ctx.strokeRect(margin + column * size, margin + row * size, size, size);
  const p = tableRow(row)[column];
  let text = `After “${label(row)}”, the model gives “${label(column)}” the probability ${percent(p)}.`;
  if (counts) {
    const times = counts[row * V + column], total = totalOf(row);
    text += ` In the training text, it came ${count(times)} times of ${count(total)}${total ? ` (${percent(times / total)})` : ""}.`;
  }
  $("table-cell").textContent = text;
  $("table").setAttribute("aria-label", `Table of the bigram model, ${V} rows and columns. ${text}`);
  $("table").dataset.cell = `${size} ${margin}`;
  $("table").parentElement.scrollLeft = margin + column * size - widthOf($("table").parentElement, 2000) / 2;
}

function moveCell(row, column) {
  const V = tokenizer.size;
  cell.row = Math.max(0, Math.min(V - 1, row));
  cell.column = Math.max(0, Math.min(V - 1, column));
  drawTable();
}

// attention

function renderAttention() {
  const { n_layer, n_head } = data.config, T = Math.min(view.ids.length, SHOWN_ATTENTION), from = view.ids.length - T;
  const grid = $("heads");
  if (!grid.children.length) {
    grid.style.gridTemplateColumns = `auto repeat(${n_head}, auto)`;
    grid.style.setProperty("--size", `clamp(40px, (100vw - 7rem) / ${n_head}, ${n_head * n_layer > 64 ? 52 : 76}px)`);
    grid.append(el("span", {}), ...Array.from({ length: n_head }, (_, head) => el("span", {}, `head ${head}`)));
    for (let layer = 0; layer < n_layer; layer++) {
      grid.append(el("span", {}, `layer ${layer}`));
      for (let head = 0; head < n_head; head++) {
        const onclick = () => enlarge(layer, head);
        grid.append(el("button", { type: "button", "aria-label": `layer ${layer}, head ${head}`, onclick }, el("canvas", {})));
      }
    }
  }
  const [r, g, b] = color("accent");
  const buttons = grid.querySelectorAll("button");
  buttons.forEach((button, i) => {
    const layer = Math.floor(i / n_head), head = i % n_head, canvas = button.firstChild;
    button.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    if (canvas.dataset.drawn === drawn()) return;
    canvas.width = canvas.height = T;
    const ctx = canvas.getContext("2d"), image = ctx.createImageData(T, T), pixels = image.data;
    for (let q = 0; q < T; q++) {
      const weights = view.attention(layer, head, from + q);
      for (let j = 0, i = 4 * q * T; j <= q; j++, i += 4) {
        [pixels[i], pixels[i + 1], pixels[i + 2]] = [r, g, b];
        pixels[i + 3] = 18 + 237 * Math.sqrt(weights[from + j]);
      }
    }
    ctx.putImageData(image, 0, 0);
    canvas.dataset.drawn = drawn();
  });
  renderHead();
}

// What the small pictures depend on.
let version = 0, lastIds = "";
function drawn() {
  const ids = `${view.ids.join()} ${color("accent")}`;
  if (ids !== lastIds) [lastIds, version] = [ids, version + 1];
  return String(version);
}

function enlarge(layer, head, focus = false) {
  const { n_layer, n_head } = data.config;
  [state.layer, state.head] = [(layer + n_layer) % n_layer, (head + n_head) % n_head];
  renderAttention();
  if (focus) $("heads").querySelectorAll("button")[state.layer * n_head + state.head].focus();
}

function renderHead() {
  const { layer, head } = state, T = Math.min(view.ids.length, SHOWN_ATTENTION), from = view.ids.length - T;
  const query = state.chosen - view.start, weights = view.attention(layer, head, query);
  const name = `Layer ${layer}, head ${head}`;
  $("head-name").textContent = name;

  // the picture
  const room = widthOf($("head").parentElement, 480), size = Math.max(1, Math.min(28, Math.floor((room - 34) / T)));
  const margin = size >= 9 ? 34 : 0;
  const ctx = context($("head"), margin + T * size, margin + T * size);
  ctx.font = `${Math.min(12, size + 1)}px ${mono}`;
  ctx.textBaseline = "middle";
  const short = view.ids.slice(from).every((id) => label(id).length === 1); // labels stand upright
  for (let q = 0; q < T; q++) {
    const row = view.attention(layer, head, from + q);
    for (let j = 0; j <= q; j++) {
      ctx.fillStyle = shade(0.05 + 0.95 * Math.sqrt(row[from + j]));
      ctx.fillRect(margin + j * size, margin + q * size, size - (size > 6 ? 1 : 0), size - (size > 6 ? 1 : 0));
    }
    if (margin) {
      ctx.fillStyle = from + q === query ? color("warm", 1) : color("muted", 1);
      ctx.textAlign = "right";
      ctx.fillText(label(view.ids[from + q]).slice(0, 5), margin - 4, margin + (q + 0.5) * size);
      ctx.save();
      ctx.translate(margin + (q + 0.5) * size, margin - 4);
      if (short) ctx.translate(0, -6);
      else ctx.rotate(-Math.PI / 2);
      ctx.textAlign = short ? "center" : "left";
      ctx.fillText(label(view.ids[from + q]).slice(0, 5), 0, 0);
      ctx.restore();
    }
  }
  if (query >= from) {
    ctx.strokeStyle = color("warm", 1);
    ctx.lineWidth = 1.5;
    ctx.strokeRect(margin, margin + (query - from) * size, (query - from + 1) * size, size);
  }
  Object.assign($("head").dataset, { size, margin, from });
  const most = ranked(weights).subarray(0, 10);
  const strongest = `${label(view.ids[query])} at position ${query} attends most to ${label(view.ids[most[0]])} at ${most[0]}, with ${percent(weights[most[0]])}`;
  $("head").setAttribute("aria-label", `${name}: attention of ${T} tokens. ${strongest}.`);

  // the chosen row
  $("looks").replaceChildren("The row of ", tokenElement("span", view.ids[query]), ` (position ${query}): its ${query + 1} weights add up to 1.`);
  $("attended").replaceChildren(
    ...Array.from(most, (key) => {
      const item = bar(`${label(view.ids[key])} ${key}`, weights[key] / weights[most[0]], percent(weights[key]));
      item.dataset.p = weights[key];
      return item;
    }),
  );
  renderArcs(query, weights);
}

// Lines from the chosen token to those that it attends to.
function renderArcs(query, weights) {
  const first = Math.max(0, query - 80), last = Math.min(view.ids.length, Math.max(query + 12, first + 40));
  const line = el("div", { class: "line" });
  for (let t = first; t < last; t++) {
    line.append(tokenElement("span", view.ids[t], t > query ? "later" : "", t <= query ? { "--weight": 100 * Math.sqrt(weights[t]) * 0.8 } : {}));
  }
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), height = 90;
  $("arcs").replaceChildren(svg, line);
  const middle = (t) => line.children[t - first].offsetLeft + line.children[t - first].offsetWidth / 2;
  const to = middle(query);
  svg.setAttribute("width", line.scrollWidth);
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Lines from the chosen token to those that it attends to; the thicker, the larger the weight");
  for (let t = first; t <= query; t++) {
    if (weights[t] < 0.005) continue;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path"), x = middle(t);
    const rise = height - Math.min(height - 8, 14 + Math.abs(to - x) * 0.35);
    path.setAttribute("d", t === query ? `M${x - 7} ${height} C${x - 16} ${height - 30} ${x + 16} ${height - 30} ${x + 7} ${height}` : `M${to} ${height} C${to} ${rise} ${x} ${rise} ${x} ${height}`);
    path.setAttribute("stroke-width", (0.5 + 6 * weights[t]).toFixed(2));
    path.setAttribute("stroke-opacity", (0.2 + 0.8 * Math.sqrt(weights[t])).toFixed(2));
    svg.append(path);
  }
  $("arcs-scroll").scrollLeft = to - widthOf($("arcs-scroll"), 2000) * 0.7;
}

// logit lens

function renderLens() {
  const { n_layer, n_embd } = data.config, t = state.chosen - view.start, T = view.ids.length;
  const layers = Array.from({ length: n_layer + 1 }, (_, layer) => layer);
  const nameOf = (layer) => (layer === 0 ? "embeddings" : `block ${layer - 1}`);
  const norms = layers.map((layer) => view.norm(layer, t)), longest = largest(norms), next = view.ids[t + 1];
  $("lens").replaceChildren(
    el("caption", { class: "small muted" }, "After ", tokenElement("span", view.ids[t]), `, position ${t}`),
    ...layers.map((layer) => {
      const cells = view.lens(layer, t).map(({ id, p }) => {
        const chip = el("td", { class: `chip ${id === next ? "next" : ""}`, "--weight": 100 * p, "data-id": id, "data-p": p }, label(id), el("small", {}, percent(p)));
        return chip;
      });
      const length = el("span", { class: "norm", "aria-hidden": true });
      length.style.width = `${(5 * norms[layer]) / longest}rem`;
      return el("tr", {}, el("th", { scope: "row" }, nameOf(layer)), ...cells, el("td", { "data-norm": norms[layer] }, length, norms[layer].toFixed(1)));
    }),
  );
  const columns = isLive ? Math.max(8, Math.min(64, Math.floor(LENS_PRODUCTS / (tokenizer.size * n_embd * (n_layer + 1))))) : T;
  const from = Math.max(0, Math.min(T - columns, t - Math.floor(columns / 2))), places = Array.from({ length: Math.min(columns, T - from) }, (_, i) => from + i);
  const row = (title, classes, of) => el("tr", { class: classes }, el("th", { scope: "row" }, title), ...places.map(of));
  $("lens-grid").replaceChildren(
    row("text", "text", (place) => el("td", { class: place === t ? "chosen" : "" }, label(view.ids[place]).slice(0, 8))),
    ...layers.map((layer) =>
      row(nameOf(layer), "", (place) => {
        const { id, p } = view.lens(layer, place)[0];
        return el("td", { "--weight": 100 * p, class: `${view.ids[place + 1] === id ? "right" : ""} ${place === t ? "chosen" : ""}` }, label(id).slice(0, 8));
      }),
    ),
  );
}

// embeddings

const embeddings = isGPT
  ? (() => {
      const map = isLive ? data.embeddings : data.recorded.map;
      return { ids: unpack(map.ids), xy: unpack(map.xy), shares: map.shares, points: [] };
    })()
  : null;
const words = isGPT ? wordChoices() : [];

function wordChoices() {
  if (!isLive) return view._words;
  const ids = Array.from(tokenBytes.keys()).filter((id) => tokenBytes.get(id).length && !tokenizer.specialIds.has(id));
  if (tokenizer.size <= SMALL_VOCABULARY) return ids;
  const isWord = (id) => /^ [A-Za-z]{3,}$/.test(latin1(tokenBytes.get(id)));
  const found = ids.filter(isWord).slice(0, WORDS);
  return found.length >= 3 ? found : ids.slice(0, WORDS);
}

let lengths = null;
const embedding = (id) => view.model.wte.subarray(id * data.config.n_embd, (id + 1) * data.config.n_embd);
const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

// Tokens by their cosine with a vector: [{id, cosine}], the nearest first.
function nearest(vector, size) {
  lengths ??= Float64Array.from({ length: tokenizer.size }, (_, id) => Math.hypot(...embedding(id)) || 1);
  const own = Math.hypot(...vector) || 1, cosines = new Float64Array(tokenizer.size), C = data.config.n_embd, { wte } = view.model;
  for (let id = 0; id < cosines.length; id++) {
    let sum = 0;
    for (let i = 0; i < C; i++) sum += wte[id * C + i] * vector[i];
    cosines[id] = sum / own / lengths[id];
  }
  return Array.from(ranked(cosines).subarray(0, size), (id) => ({ id, cosine: cosines[id] }));
}

function neighbors(id) {
  if (isLive) return nearest(embedding(id), 13).filter((other) => other.id !== id).slice(0, 12);
  const row = view._occurring.indexOf(id), size = view._nearest.shape[1];
  if (row < 0) return [];
  const all = Array.from({ length: size }, (_, i) => ({ id: view._nearest[row * size + i], cosine: view._cosines[row * size + i] }));
  return all.filter((other) => other.id !== id).slice(0, 12);
}

// The tokens nearest to a - b + c, each an id.
function sum(a, b, c) {
  if (isLive) return nearest(embedding(a).map((value, i) => value - embedding(b)[i] + embedding(c)[i]), 10);
  const size = words.length, terms = [[a, 1], [b, -1], [c, 1]].map(([id, sign]) => [words.indexOf(id), sign * view._word_norms[words.indexOf(id)]]);
  const cosine = (i, j) => view._gram[i * size + j] / 32767;
  let square = 0;
  for (const [i, x] of terms) for (const [j, y] of terms) square += x * y * cosine(i, j);
  const own = Math.sqrt(square);
  const all = Array.from(words, (id, d) => ({ id, cosine: terms.reduce((total, [i, x]) => total + x * cosine(i, d), 0) / own }));
  return all.sort((x, y) => y.cosine - x.cosine).slice(0, 10);
}

function near(id) {
  return () => {
    state.near = id;
    renderEmbeddings();
  };
}

function similarBars(list, muted = []) {
  return list.map(({ id, cosine }) => {
    const item = bar(label(id), cosine, cosine.toFixed(3), { classes: muted.includes(id) ? "cut" : "", onclick: near(id) });
    item.dataset.id = id;
    item.dataset.p = cosine;
    return item;
  });
}

function renderEmbeddings() {
  const id = state.near ?? allIds()[state.chosen], found = neighbors(id);
  $("nearest-name").replaceChildren("Nearest to ", tokenElement("span", id));
  $("nearest").replaceChildren(...(found.length ? similarBars(found) : [el("li", {}, "only for tokens of the text")]));
  drawMap(id, found);
}

function drawMap(id, found) {
  const size = widthOf($("map").parentElement, 500), ctx = context($("map"), size, size);
  const { ids, xy } = embeddings, all = ids.length <= MAP_LABELS;
  let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < ids.length; i++) {
    left = Math.min(left, xy[2 * i]);
    right = Math.max(right, xy[2 * i]);
    top = Math.min(top, xy[2 * i + 1]);
    bottom = Math.max(bottom, xy[2 * i + 1]);
  }
  const pad = 24, text = new Set(view.ids), near = new Set(found.slice(0, 8).map((other) => other.id));
  embeddings.points = Array.from(ids, (_, i) => [
    pad + ((xy[2 * i] - left) / (right - left || 1)) * (size - 2 * pad),
    pad + ((xy[2 * i + 1] - top) / (bottom - top || 1)) * (size - 2 * pad),
  ]);
  ctx.font = `${all ? 13 : 11}px ${mono}`;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  const colors = { muted: color("muted", all ? 0.95 : 0.35), text: color("ink", 0.95), accent: color("accent", 1), warm: color("warm", 1) };
  const order = Array.from(ids.keys()).sort((a, b) => rank(ids[a]) - rank(ids[b]));
  function rank(other) {
    return other === id ? 3 : near.has(other) ? 2 : text.has(other) ? 1 : 0;
  }
  for (const i of order) {
    const [x, y] = embeddings.points[i], level = rank(ids[i]);
    ctx.fillStyle = [colors.muted, colors.text, colors.accent, colors.warm][level];
    if (all || level) {
      if (level === 3) ctx.font = ctx.font.replace(/^\d+px/, "bold 16px");
      ctx.fillText(label(ids[i]), x, y);
      if (level === 3) ctx.font = ctx.font.replace(/^bold 16px/, `${all ? 13 : 11}px`);
    } else ctx.fillRect(x - 1.5, y - 1.5, 3, 3);
  }
  const shares = embeddings.shares.map(percent);
  $("map-note").textContent = `Two principal components, ${shares[0]} and ${shares[1]} of the variance: the other ${count(data.config.n_embd - 2)} dimensions are not in the picture. Orange: the chosen token; blue: its nearest.`;
  $("map").setAttribute("aria-label", `Map of the embeddings of ${ids.length} tokens. Nearest to ${label(id)}: ${found.slice(0, 5).map((other) => label(other.id)).join(", ")}.`);
}

function setSums() {
  const find = (text) => words.find((id) => tokenizer.decode([id]) === text);
  const example = ANALOGIES.map((three) => three.map(find)).find((three) => three.every((id) => id !== undefined)) ?? Array.from(words).slice(0, 3);
  ["a", "b", "c"].forEach((name, i) => {
    const select = $(`word-${name}`);
    select.append(...Array.from(words, (id) => el("option", { value: id }, label(id))));
    select.value = example[i];
    select.addEventListener("change", renderSum);
  });
  $("sum-note").textContent = "Faded: the three themselves, which are often the nearest. The famous examples leave them out, and are picked among many that fail." +
    (isLive ? "" : ` Among ${count(words.length)} tokens.`);
  renderSum();
}

function renderSum() {
  const three = ["a", "b", "c"].map((name) => Number($(`word-${name}`).value));
  $("sum").replaceChildren(...similarBars(sum(...three), three));
}

// generate(), step by step

const stepIds = () => (isLive ? allIds() : state.prompt.concat(state.written.slice(0, state.cursor)));

function phases() {
  const draws = state.sampling.temperature < 1e-5 ? ["argmax"] : ["temperature", "top-k", "top-p", "draw"];
  return ["idx", "window", "forward", "last position", ...draws, "torch.cat"];
}

// The text of a step: {shapes, text, rows, code: [function, marks]}.
function describeStep(name, ids) {
  const { block_size, vocab_size: V } = data.config, N = ids.length, T = isGPT ? Math.min(N, block_size) : N;
  const at = isLive ? view.ids.length - 1 : N - 1, found = distributionAt(at), { choices, scaled, k, kept, p, rest } = found;
  const { temperature, topK, topP } = state.sampling, cached = isGPT && N <= block_size;
  const top = (values, size, format) => Array.from({ length: Math.min(8, size) }, (_, i) => [label(choices.ids[i]), values[i], format(values[i])]);
  const fixed = (value) => value.toFixed(3);
  switch (name) {
    case "idx":
      return { shapes: ["idx", shape(1, N)], text: `The text so far: B = 1 row of ${count(N)} ids. Each turn of the loop makes it one longer.`, chips: ids, code: ["LanguageModel.stream", []] };
    case "window": {
      const long = `idx is longer than block_size = ${count(block_size)}, so only its last ${count(block_size)} ids go in: the window slides, and the first tokens are forgotten.`;
      const short = `T = ${count(N)} is the present length, block_size = ${count(block_size)} the most that the model can see. All of idx still fits.` + (cached ? " The keys and values of earlier tokens are in the KV cache, so that only what is new has to be computed." : "");
      const free = `A bigram model has no context: it looks at the last token only, however long idx is.`;
      return { shapes: ["idx[:, -block_size:]", shape(1, T)], text: !isGPT ? free : N > block_size ? long : short, chips: ids, outside: N - T, code: ["LanguageModel.stream", [cached ? "decode" : "window"]] };
    }
    case "forward":
      return { shapes: ["logits", shape(1, T, V)], text: `The model gives V = ${count(V)} logits for each of the T = ${count(T)} positions: what may follow there. To generate, only the last row is needed, and model.py computes no other: its logits are ${shape(1, 1, V)}.`, heat: true, code: isGPT ? ["GPT.forward", ["lm_head"]] : ["Bigram.forward", ["table"]] };
    case "last position":
      return { shapes: ["logits[:, -1, :]", shape(1, V)], text: `The row of the last token, ${label(ids[N - 1])}: one number for each token of the vocabulary.`, rows: top(choices.logits, choices.ids.length, fixed), code: ["LanguageModel.stream", ["last"]] };
    case "temperature":
      return { shapes: ["logits / temperature", shape(1, V)], text: `Divided by ${temperature}: ${temperature < 1 ? "below 1, differences grow, and the likely gets likelier" : temperature > 1 ? "above 1, differences shrink, and the unlikely gets its chance" : "1 changes nothing"}.`, rows: top(scaled, choices.ids.length, fixed), code: ["sample_next", ["scale"]] };
    case "top-k":
      return { shapes: ["logits.topk(k)", shape(1, topK && topK < V ? k : V)], text: topK && topK < choices.size ? `Only the ${count(k)} likeliest stay.` : `top-k is ${topK || "off"}: all ${count(choices.size)} tokens stay.`, rows: top(scaled, k, fixed), code: ["sample_next", ["top_k"]] };
    case "top-p":
      return { shapes: ["softmax", shape(1, topK && topK < V ? k : V)], text: topP < 1 ? `softmax makes probabilities of them. The likeliest that together have ${topP} stay: ${count(kept)}.` : "softmax makes probabilities of them: positive, and 1 in all. top-p is 1: all stay.", rows: top(p, kept, percent), code: ["sample_next", ["top_p"]] };
    case "draw": {
      const text = "torch.multinomial(probs, 1) would draw from these probabilities. model.py does the same by adding Gumbel noise to the logits and taking the largest sum.";
      if (!isLive) return { shapes: ["token", shape(1, 1)], text: `${text} look.py drew this one, with its own noise.`, rows: top(p, kept, percent), chips: [data.written_ids[state.cursor]], isNew: true, code: ["sample_next", ["noise", "draw"]] };
      state.noise ??= draw(scaled, kept, random);
      const sums = Array.from({ length: kept }, (_, i) => scaled[i] + state.noise.noise[i]);
      const rows = Array.from(ranked(Float64Array.from(sums)).subarray(0, 8), (i) => [label(choices.ids[i]), sums[i], `${fixed(scaled[i])} ${state.noise.noise[i] < 0 ? "−" : "+"} ${fixed(Math.abs(state.noise.noise[i]))}`]);
      return { shapes: ["token", shape(1, 1)], text, rows, chips: [choices.ids[state.noise.best]], isNew: true, code: ["sample_next", ["noise", "draw"]] };
    }
    case "argmax":
      return { shapes: ["token", shape(1, 1)], text: "Temperature 0 is greedy decoding: always the largest logit.", rows: top(choices.logits, choices.ids.length, fixed), chips: [isLive ? choices.ids[0] : data.written_ids[state.cursor]], isNew: true, code: ["sample_next", ["greedy"]] };
    default: {
      const token = isLive ? choices.ids[temperature < 1e-5 ? 0 : (state.noise ??= draw(scaled, kept, random)).best] : data.written_ids[state.cursor];
      return { shapes: ["torch.cat((idx, token), dim=1)", shape(1, N + 1)], text: "The new token goes to the end of idx, and the loop starts again with one token more.", chips: ids.concat(token), isNew: true, token, code: ["LanguageModel.stream", ["cat"]] };
    }
  }
}

function renderStep() {
  const names = phases(), name = names[state.phase], ids = stepIds();
  $("phases").replaceChildren(...names.map((other) => el("li", { "aria-current": other === name ? "step" : undefined }, other)));
  const done = !isLive && state.cursor >= state.written.length;
  for (const id of ["step", "step-token", "step-run"]) $(id).disabled = done;
  if (done && state.phase === 0) {
    $("step-view").replaceChildren(el("p", {}, "That was all that look.py wrote. "), el("p", { class: "muted small" }, data.tokenizer.why ? `${data.tokenizer.why[0].toUpperCase()}${data.tokenizer.why.slice(1)}.` : ""));
    return showCode($("step-code"), "LanguageModel.stream", []);
  }
  const step = describeStep(name, ids);
  const parts = [el("p", { class: "shapes" }, `${step.shapes[0]} `, el("b", {}, step.shapes[1])), el("p", {}, step.text)];
  if (step.chips) {
    const shown = step.chips.slice(-40), hidden = step.chips.length - shown.length, row = el("div", { class: "chips" });
    if (hidden) row.append(el("span", { class: "muted small" }, `… ${count(hidden)} more`));
    shown.forEach((id, i) => {
      const classes = `${step.isNew && i === shown.length - 1 ? "new" : ""} ${hidden + i < (step.outside ?? 0) ? "outside" : ""}`;
      row.append(tokenElement("span", id, classes));
      row.lastChild.append(el("small", {}, String(id)));
    });
    parts.push(row);
  }
  if (step.rows) {
    const values = step.rows.map((row) => row[1]), low = Math.min(0, ...values), high = Math.max(...values) - low || 1;
    parts.push(el("ol", { class: "bars" }, ...step.rows.map(([text, value, number]) => bar(text, (value - low) / high, number))));
  }
  if (step.heat && isLive) parts.push(heat());
  $("step-view").replaceChildren(...parts);
  showCode($("step-code"), ...step.code);
}

// The logits (T, V) as a picture, the last row marked.
function heat() {
  const rows = view.model.logits.slice(-64), columns = Math.min(128, tokenizer.size);
  const canvas = el("canvas", { role: "img", "aria-label": `Logits of the last ${rows.length} positions and of ${columns} tokens; the last row is marked` });
  const width = Math.max(2, Math.floor(340 / columns)), height = rows.length > 32 ? 4 : 7, ctx = context(canvas, columns * width, rows.length * height + 2);
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
  const { line, text, marks: known } = data.source[name], spans = marks.map((mark) => known[mark]);
  const isOn = (number) => spans.some(([first, last]) => first <= number && number <= last);
  const rows = text.replace(/\n$/, "").split("\n").map((row, i) =>
    el("span", { class: `l${isOn(line + i) ? " on" : ""}` }, el("i", { "aria-hidden": true }, String(line + i)), row || " "));
  const pre = el("pre", { tabindex: 0, "aria-label": `${name} in model.py` }, ...rows);
  place.replaceChildren(el("p", {}, `model.py, line ${spans.length ? spans[0][0] : line}: ${name}`), pre);
  const first = pre.querySelector(".on");
  if (first) pre.scrollTop = first.offsetTop - pre.offsetTop - 70;
}

// architecture

function parts() {
  const { n_layer: L, n_head, n_embd: C, block_size, vocab_size: V, bias, gelu } = data.config;
  const hs = C / n_head, T = view.ids.length, x = `(B, T, C) = ${shape(1, T, C)}`;
  const ids = { id: "idx", name: "idx", out: `(B, T) = ${shape(1, T)}`, text: "The ids of the tokens: B texts of T tokens. Here B is 1.", code: [isGPT ? "GPT.forward" : "Bigram.forward", []] };
  if (!isGPT) {
    return [
      ids,
      { id: "table", name: "token_embedding_table", weights: /./, in: ids.out, out: `(B, T, V) = ${shape(1, T, V)}`, text: "Row i of the table holds the logits of what follows token i. That is the whole model.", code: ["Bigram.forward", ["table"]] },
      { id: "sample", name: "sample the next token", in: `(B, V) = ${shape(1, V)}`, out: "(B, 1)", text: "Temperature, top-k, top-p, softmax and a draw.", code: ["sample_next", ["draw"]] },
    ];
  }
  const norm = `LayerNorm: each position minus its mean, divided by its standard deviation, times a weight${bias ? ", plus a bias" : ""}.`;
  const block = (id, name, more) => ({ id, name, block: true, in: x, out: x, ...more });
  return [
    ids,
    { id: "wte", name: "token embedding", weights: /^transformer\.wte/, in: ids.out, out: x, text: `A table: one vector of C = ${count(C)} numbers for each of the V = ${count(V)} tokens. The output head uses the same table.`, code: ["GPT.forward", ["embed"]] },
    { id: "wpe", name: "+ position embedding", weights: /^transformer\.wpe/, in: `positions 0 to ${T - 1}`, out: x, text: `A second table, one vector for each of the block_size = ${count(block_size)} positions. The two are added.`, code: ["GPT.forward", ["embed"]] },
    block("ln_1", "LayerNorm ln_1", { weights: /\.ln_1\./, text: norm, code: ["Block.forward", ["attn"]] }),
    block("attn", "causal self-attention", { weights: /\.attn\./, text: `Each position asks with its query, and takes the values of the positions up to itself whose keys fit: ${n_head} heads with ${hs} channels each, q, k, v ${shape(1, n_head, T, hs)}, weights ${shape(1, n_head, T, T)}.`, code: ["CausalSelfAttention.forward", ["qkv", "attend", "proj"]] }),
    block("add_1", "+", { round: true, text: "The result is added to x: the residual stream.", code: ["Block.forward", ["add"]] }),
    block("ln_2", "LayerNorm ln_2", { weights: /\.ln_2\./, text: norm, code: ["Block.forward", ["mlp"]] }),
    block("mlp", "MLP", { weights: /\.mlp\./, text: `For each position alone: from ${count(C)} channels to ${count(4 * C)}, GELU (${gelu === "tanh" ? "its tanh approximation" : "exact"}), and back.`, code: ["MLP.forward", ["mlp"]] }),
    block("add_2", "+", { round: true, text: "Added to x again. The next block starts from here.", code: ["Block.forward", ["mlp"]] }),
    { id: "ln_f", name: "LayerNorm ln_f", weights: /\.ln_f\./, in: x, out: x, text: `${norm} The last one, before the head.`, code: ["GPT.forward", ["ln_f"]] },
    { id: "lm_head", name: "output head lm_head", tied: true, in: x, out: `(B, T, V) = ${shape(1, T, V)}`, text: `The dot product with each token's embedding gives its logit. The matrix is that of the token embedding (tied), so that it adds no parameters.`, code: ["GPT.forward", ["lm_head"]] },
    { id: "loss", name: "loss, with targets", in: `logits (B, T, V), targets (B, T)`, out: "one number", text: "In training, cross-entropy compares the logits with the targets, idx shifted by one. Without targets there is no loss: forward returns (logits, None).", code: ["GPT.forward", ["returns"]] },
    { id: "sample", name: "sample the next token", in: `(B, V) = ${shape(1, V)}`, out: "(B, 1)", text: "To generate, from the last position: temperature, top-k, top-p, softmax and a draw.", code: ["sample_next", ["draw"]] },
  ];
}

const sizeOf = (sizes) => sizes.reduce((product, size) => product * size, 1);
const totalParameters = Object.values(data.parameters).reduce((sum, sizes) => sum + sizeOf(sizes), 0);
const weightsOf = (part) => (part.weights ? Object.entries(data.parameters).filter(([name]) => part.weights.test(name)) : []);
const parametersOf = (part) => weightsOf(part).reduce((sum, [, sizes]) => sum + sizeOf(sizes), 0);

function renderArchitecture() {
  const diagram = $("diagram"), all = parts(), L = data.config.n_layer;
  let block = null, branch = null; // a branch: what is added to the residual stream, the line beside it
  for (const part of all) {
    const number = part.block ? parametersOf(part) / L : parametersOf(part);
    const about = part.tied ? "tied" : number ? count(number) : "";
    const button = el("button", { type: "button", class: `part${part.round ? " round" : ""}`, "data-part": part.id, "aria-pressed": false, onclick: () => showPart(part.id) }, part.name, el("small", {}, about));
    if (part.block && !block) {
      block = el("div", { class: "block", role: "group", "aria-label": `Block, ${L} of them` }, el("p", {}, `${count(L)} blocks like this one, each with its own weights`));
      diagram.append(el("span", { class: "flow" }, "x (B, T, C)"), block);
    } else if (!part.block && part !== all[0] && part.id !== "wpe") {
      const flow = { ln_f: "x (B, T, C)", lm_head: "x (B, T, C)", loss: "logits (B, T, V)", sample: "or logits[:, -1, :] (B, V)", table: "(B, T)", wte: "(B, T)" }[part.id];
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
  const part = parts().find((other) => other.id === state.part), L = data.config.n_layer;
  for (const button of $("diagram").querySelectorAll(".part")) button.setAttribute("aria-pressed", button.dataset.part === state.part);
  const weights = weightsOf(part).filter(([name]) => !part.block || name.startsWith("transformer.h.0."));
  const number = parametersOf(part), share = percent(number / totalParameters);
  const facts = [
    ...(part.in ? [["in", part.in]] : []),
    ["out", part.out],
    ...weights.map(([name, sizes]) => [name.replace(/^transformer\.h\.0\./, "").replace(/^transformer\./, ""), shape(...sizes)]),
    ...(number ? [["parameters", part.block ? `${count(number / L)} × ${L} blocks = ${count(number)} (${share})` : `${count(number)} (${share})`]] : []),
  ];
  $("part").replaceChildren(el("h3", { style: "margin-top: 0" }, part.name), el("p", {}, part.text), el("table", { class: "facts" }, el("tbody", {}, ...facts.map(([key, value]) => el("tr", {}, el("td", {}, key), el("td", {}, value))))));
  showCode($("part-code"), ...part.code);
}

// the beginning

function texts() {
  const { n_layer, n_head, n_embd, block_size } = data.config, V = tokenizer.size;
  document.title = `Inside ${data.title}`;
  $("title").textContent = data.title;
  const size = totalParameters >= 1e6 ? `${(totalParameters / 1e6).toFixed(totalParameters < 1e7 ? 2 : 0)} million parameters` : `${count(totalParameters)} parameters`;
  const trained = data.trained.iter_num > 0 ? ` · ${count(data.trained.iter_num)} iterations${data.trained.best_val_loss !== null ? `, validation loss ${data.trained.best_val_loss.toFixed(3)}` : ""}` : "";
  $("shape").textContent = isGPT
    ? `GPT · ${size} · ${n_layer} layers · ${n_head} heads · ${count(n_embd)} channels · context of ${count(block_size)} tokens · ${data.tokenizer_name}${trained}`
    : `Bigram model · ${size} · ${data.tokenizer_name}${trained}`;
  $("tokens-lead").textContent = "A model reads numbers. The tokenizer turns text into tokens, each with an id; the more surprising a token is to the model after those before it, the stronger its colour. Click a token, or use the arrow keys: all that is below belongs to it.";
  $("next-lead").textContent = `After the chosen token, the model gives each of ${count(V)} tokens a logit, and softmax turns these into probabilities. The sliders change what is drawn from, not the model.`;
  $("table-lead").textContent = `A bigram model is a table: row i says what follows token i: its column is the next token.${counts ? " The colour shows how often each pair occurs in the training text." : " The colour shows the model's probability."} Click a cell, or move with the arrow keys.`;
  $("embeddings-lead").textContent = `The first thing the model does with an id is to look up its embedding, a vector of ${count(n_embd)} learned numbers. Tokens that are used alike end up near each other: here, by the cosine of the angle between them.`;
  $("generate-lead").textContent = isLive
    ? "The model predicts one token, which is appended to the text; then it runs again. Each step with its shapes, and its line of model.py."
    : "How look.py wrote this text, one token at a time. Each step with its shapes, and its line of model.py.";
  $("architecture-lead").textContent = "From ids to logits, with the shapes and parameters of this model. Click a part: its shapes, its weights, its lines of model.py.";
  $("footer").textContent = isLive
    ? `This file holds the model, its weights in 16 bits, and runs it: nothing is sent anywhere. Seed ${data.sampling.seed}.`
    : `This file holds what the model computed for this text, ${count(view.ids.length)} tokens. A model of up to 5 million parameters would run in it.`;
}

function listen() {
  $("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(document.documentElement.dataset.theme ?? ""));
  $("previous").addEventListener("click", () => choose(state.chosen - 1));
  $("next").addEventListener("click", () => choose(state.chosen + 1));
  $("tokens").addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token && !token.classList.contains("outside")) choose(Number(token.dataset.index), true);
  });
  $("tokens").addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: state.chosen - 1, ArrowRight: state.chosen + 1, Home: view.start, End: allIds().length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(moves[event.key], true);
  });
  $("heads").addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    enlarge(state.layer + moves[event.key][0], state.head + moves[event.key][1], true);
  });
  $("head").addEventListener("click", (event) => {
    const { size, margin, from } = $("head").dataset;
    choose(view.start + Number(from) + Math.floor((event.offsetY - margin) / size));
  });
  $("map").addEventListener("click", (event) => {
    const distances = embeddings.points.map(([x, y]) => Math.hypot(x - event.offsetX, y - event.offsetY));
    const id = embeddings.ids[distances.indexOf(Math.min(...distances))];
    near(id)();
  });
  $("table").addEventListener("click", (event) => {
    const [size, margin] = $("table").dataset.cell.split(" ").map(Number);
    moveCell(Math.floor((event.offsetY - margin) / size), Math.floor((event.offsetX - margin) / size));
  });
  $("table").addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    moveCell(cell.row + moves[event.key][0], cell.column + moves[event.key][1]);
  });
  $("text").addEventListener("input", typed);
  $("chat").addEventListener("change", () => {
    state.chat = $("chat").checked;
    typed();
  });
  $("write").addEventListener("click", () => (stop(), writeOne()));
  $("run").addEventListener("click", () => repeat($("run"), "run", writeOne));
  $("clear").addEventListener("click", () => {
    stop();
    state.written = [];
    update();
  });
  $("step").addEventListener("click", () => (stop(), step()));
  $("step-token").addEventListener("click", () => (stop(), stepToken()));
  $("step-run").addEventListener("click", () => repeat($("step-run"), "step-run", step));
  $("step-back").addEventListener("click", stepBack);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    widths.clear();
    if (width !== window.innerWidth) renderChosen();
    width = window.innerWidth;
  });
}

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").textContent = isDark() ? "Light" : "Dark";
  palette.clear();
  table = null;
  renderChosen();
  renderStep();
}

function begin() {
  const canType = isLive && tokenizer.kind !== "none";
  $("text").value = canType ? data.prompt : tokenizer.decode(allIds());
  $("text").readOnly = !canType;
  if (!canType) note(`The text is fixed: ${data.tokenizer.why}.`);
  for (const id of ["write", "run", "clear"]) $(id).hidden = !isLive;
  $("chat-row").hidden = !data.chat || !canType;
  if (data.chat) {
    $("chat").checked = state.chat;
    $("chat-label").textContent = `a message to the chat model, in its format (${data.chat.name})`;
  }
  for (const id of ["s-attention", "s-lens", "s-embeddings"]) $(id).hidden = !isGPT;
  $("s-table").hidden = isGPT;
  view.update(allIds());
  setSliders();
  update(Math.max(0, state.prompt.length - 1));
  texts();
  renderArchitecture();
  $("calculate").hidden = words.length < 3;
  if (words.length >= 3) setSums();
  listen();
  $("theme").textContent = isDark() ? "Light" : "Dark";
}

begin();
