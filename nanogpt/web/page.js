// The page: its text, the next token, and what follows from a click or a key. Text from a model only becomes text nodes.
"use strict";

const BARS = 16; // likeliest tokens shown
const SURPRISE_BITS = 8; // full colour
const SHOWN_TOKENS = 200; // of a long text, the last ones
const MOST_DIFFERENCE = 0.1; // between the page's logits and PyTorch's, whose weights have 32 bits
const WRITE_AT_ONCE = 2000; // tokens of "Keep writing"

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
  note(
    missing &&
      (tokenizer.kind === "ids"
        ? `These tokens have no text: write ids below ${count(tokenizer.size)}, got ${JSON.stringify(missing)}`
        : `${JSON.stringify(missing)} is left out: it is not among the ${data.tokenizer_name} of this model.`),
  );
  update();
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

// Everything follows from the ids: run the model on what is new, then draw.
function update(chosen = allIds().length - 1) {
  view.update(allIds());
  state.chosen = Math.max(chosen, view.start);
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
  const ids = allIds();
  const first = Math.max(0, Math.min(ids.length - SHOWN_TOKENS, view.start));
  const row = $("tokens");
  let total = 0;
  row.replaceChildren(...(first ? [el("span", { class: "muted small" }, `… ${count(first)} tokens before`)] : []));
  for (let index = first; index < ids.length; index++) {
    const id = ids[index];
    const surprise = index > view.start ? bits(index) : null;
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
    const chance = surprise === null ? "" : `, probability ${percent(2 ** -surprise)}`;
    attributes.title = `id ${id}, bytes ${hex(tokenBytes.get(id) ?? []).join(" ")}${chance}`;
    const token = tokenElement("div", id, classes, attributes);
    token.append(el("small", { "aria-hidden": true }, String(id)));
    row.append(token);
    if (endsLine(id) && index + 1 < ids.length) row.append(el("span", { class: "break", role: "presentation" }));
  }
  requestAnimationFrame(() => (row.scrollTop = row.scrollHeight)); // not now, since that would lay out the page twice
  $("legend-outside").hidden = view.start === 0;
  $("clear").disabled = !isLive || !state.written.length;
  const predicted = view.ids.length - 1;
  const nats = (total / predicted) * Math.LN2;
  $("loss").textContent = predicted
    ? `Mean surprise of this text: ${(total / predicted).toFixed(2)} bits a token. In nats that is its loss, ${nats.toFixed(3)}` +
      ` (cross-entropy); perplexity ${Math.exp(nats).toFixed(1)}.`
    : "";
}

function renderDetail() {
  const index = state.chosen;
  const id = allIds()[index];
  const bytes = tokenBytes.get(id) ?? [];
  const surprise = bits(index);
  const name = tokenizer.specialIds.has(id) ? "special token" : "token";
  const facts = {
    [name]: label(id),
    position: `${index - view.start} (0 to ${view.ids.length - 1})`,
    id: String(id),
    bytes: hex(bytes).join(" "),
    probability: surprise === null ? "nothing before it" : percent(2 ** -surprise),
    surprise: surprise === null ? "–" : `${surprise.toFixed(2)} bits`,
  };
  $("detail").replaceChildren(
    ...Object.entries(facts).map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))),
  );
  $("chosen").replaceChildren(`token ${index + 1} of ${allIds().length} `, tokenElement("span", id), ` id ${id}`);
  $("previous").disabled = index <= view.start;
  $("next").disabled = index >= allIds().length - 1;
}

// the next token

function distributionAt(t) {
  const choices = view.choices(t);
  const { temperature, topK, topP } = state.sampling;
  return { choices, ...distribution(choices, temperature, topK, topP) };
}

function bar(name, share, number, { classes = "", ghost = null, onclick = null, label: title = "" } = {}) {
  const track = el("span", { class: "track", "aria-hidden": true }, el("span", { class: "fill" }));
  track.firstChild.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  if (ghost !== null) {
    track.append(el("span", { class: "ghost" }));
    track.lastChild.style.width = `${100 * Math.min(1, ghost)}%`;
  }
  const text = onclick
    ? el("button", { type: "button", class: "name", onclick, "aria-label": title || name }, name)
    : el("span", { class: "name" }, name);
  return el("li", { class: classes }, text, track, el("span", { class: "number" }, number));
}

function renderNext() {
  const t = state.chosen - view.start;
  const found = distributionAt(t);
  const { choices, k, kept, p, rest } = found;
  const next = allIds()[state.chosen + 1];
  const written = state.chosen + 1 >= state.prompt.length;
  const plain = distribution(choices, 1, 0, 0).p;
  const shown = Array.from({ length: Math.min(BARS, choices.ids.length) }, (_, i) => i);
  const place = next === undefined ? -1 : choices.ids.indexOf(next);
  if (place >= BARS) shown.push(place);
  const scale = Math.max(p[0], plain[0]);
  const rows = shown.map((i) => {
    const id = choices.ids[i];
    const isNext = id === next;
    const share = i < kept ? p[i] : 0;
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
  if (rest)
    rows.push(bar(`other ${count(choices.size - choices.ids.length)}`, rest / scale, percent(rest), { classes: "rest" }));
  $("bars").replaceChildren(...rows);
  const mass = plain.subarray(0, kept).reduce((sum, value) => sum + value, 0);
  const size = rest ? choices.size : kept;
  const how =
    state.sampling.temperature < 1e-5
      ? "Greedy: always the likeliest."
      : `The draw is among ${count(size)} of ${count(choices.size)} tokens, which hold ${percent(rest ? 1 : mass)} of the ` +
        "model's own probability.";
  $("kept").textContent =
    `${how} The orange mark is the model's own probability, before the sliders.` +
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
      const words = { top_k: value === 0 || value >= tokenizer.size ? "all" : value, temperature: value || "0 (greedy)" };
      $(`${id}-out`).textContent = words[id] ?? value;
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

// the beginning

function texts() {
  const { n_layer, n_head, n_embd, block_size } = data.config;
  const { iter_num, best_val_loss } = data.trained;
  const millions = (totalParameters / 1e6).toFixed(totalParameters < 1e7 ? 2 : 0);
  const facts = isGPT ? ["GPT"] : ["Bigram model"];
  facts.push(totalParameters >= 1e6 ? `${millions} million parameters` : `${count(totalParameters)} parameters`);
  if (isGPT) facts.push(`${n_layer} layers`, `${n_head} heads`, `${count(n_embd)} channels`);
  if (isGPT) facts.push(`context of ${count(block_size)} tokens`);
  facts.push(data.tokenizer_name);
  if (iter_num > 0) facts.push(`${count(iter_num)} iterations`);
  if (best_val_loss !== null) facts.push(`validation loss ${best_val_loss.toFixed(3)}`);
  document.title = `Inside ${data.title}`;
  $("title").textContent = data.title;
  $("shape").textContent = facts.join(" · ");
  $("size").textContent = count(tokenizer.size);
  $("channels").textContent = count(n_embd);
  $("table-colour").textContent = counts ? "how often each pair occurs in the training text" : "the model's probability";
  $("generate-what").textContent = isLive
    ? "The model predicts one token, which is appended to the text; then it runs again."
    : "How look.py wrote this text, one token at a time.";
  $("footer").textContent = isLive
    ? "This file holds the model, its weights in 16 bits, and runs it: nothing is sent anywhere. At the end of the text that " +
      `look.py wrote, its logits are within ${difference.toFixed(4)} of PyTorch's. Seed ${data.sampling.seed}.`
    : `This file holds what the model computed for this text, ${count(view.ids.length)} tokens. ` +
      "A model of up to 5 million parameters would run in it.";
}

// Compare the logits of the last position with those that look.py got from model.py, which people change.
let difference = 0;
function compare() {
  const wanted = unpack(data.logits);
  difference = largest(view.model.logits.at(-1).map((logit, i) => Math.abs(logit - wanted[i])));
  if (difference < MOST_DIFFERENCE) return;
  note(
    `The logits of this page are not those of model.py (by ${difference.toFixed(2)}): if it was changed, change web/model.js.`,
  );
}

function listen() {
  $("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  prefersDark.addEventListener("change", () => setTheme(document.documentElement.dataset.theme ?? ""));
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

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
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
  if (isLive) compare();
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
