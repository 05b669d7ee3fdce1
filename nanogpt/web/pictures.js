// What belongs to the chosen token: attention, logit lens, embeddings; or the table of a bigram model.
"use strict";

const SHOWN_ATTENTION = 256; // positions, the last ones
const LENS_PRODUCTS = 1e8; // for the table of all positions, of which a larger model shows fewer
const MAP_LABELS = 130; // with more tokens, only some of a map have labels
const MAP_DENSE = 5000; // with more tokens, their dots are smaller and paler
const ANALOGIES = [
  [" king", " man", " woman"],
  ["a", "A", "B"],
];

// attention

function renderAttention() {
  const { n_layer, n_head } = data.config;
  const T = Math.min(view.ids.length, SHOWN_ATTENTION);
  const from = view.ids.length - T;
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
    const layer = Math.floor(i / n_head);
    const head = i % n_head;
    const canvas = button.firstChild;
    button.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    if (canvas.dataset.drawn === drawn()) return;
    canvas.width = canvas.height = T;
    const ctx = canvas.getContext("2d");
    const image = ctx.createImageData(T, T);
    const pixels = image.data;
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
let version = 0;
let lastIds = "";
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
  const { layer, head } = state;
  const T = Math.min(view.ids.length, SHOWN_ATTENTION);
  const from = view.ids.length - T;
  const query = state.chosen - view.start;
  const weights = view.attention(layer, head, query);
  const name = `Layer ${layer}, head ${head}`;
  $("head-name").textContent = name;

  // the picture
  const room = widthOf($("head").parentElement, 480);
  const size = Math.max(1, Math.min(28, Math.floor((room - 34) / T)));
  const margin = size >= 9 ? 34 : 0;
  const ctx = context($("head"), margin + T * size, margin + T * size);
  ctx.font = `${Math.min(12, size + 1)}px ${mono}`;
  ctx.textBaseline = "middle";
  const short = view.ids.slice(from).every((id) => label(id).length === 1); // labels stand upright
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage($("heads").querySelectorAll("canvas")[layer * data.config.n_head + head], margin, margin, T * size, T * size);
  for (let q = 0; q < T; q++) {
    if (size > 6) {
      ctx.clearRect(margin, margin + (q + 1) * size - 1, T * size, 1); // lines between the cells
      ctx.clearRect(margin + (q + 1) * size - 1, margin, 1, T * size);
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
  const strongest =
    `${label(view.ids[query])} at position ${query} attends most to ${label(view.ids[most[0]])} at ${most[0]}, ` +
    `with ${percent(weights[most[0]])}`;
  $("head").setAttribute("aria-label", `${name}: attention of ${T} tokens. ${strongest}.`);

  // the chosen row
  $("looks").replaceChildren(
    "The row of ",
    tokenElement("span", view.ids[query]),
    ` (position ${query}): its ${query + 1} weights add up to 1.`,
  );
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
  const first = Math.max(0, query - 80);
  const last = Math.min(view.ids.length, Math.max(query + 12, first + 40));
  const line = el("div", { class: "line" });
  for (let t = first; t < last; t++) {
    const weight = t <= query ? { "--weight": 80 * Math.sqrt(weights[t]) } : {};
    line.append(tokenElement("span", view.ids[t], t > query ? "later" : "", weight));
  }
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const height = 90;
  $("arcs").replaceChildren(svg, line);
  const middle = (t) => line.children[t - first].offsetLeft + line.children[t - first].offsetWidth / 2;
  const to = middle(query);
  svg.setAttribute("width", line.scrollWidth);
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Lines from the chosen token to those that it attends to; the thicker, the larger the weight");
  for (let t = first; t <= query; t++) {
    if (weights[t] < 0.005) continue;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const x = middle(t);
    const rise = height - Math.min(height - 8, 14 + Math.abs(to - x) * 0.35);
    const loop = `M${x - 7} ${height} C${x - 16} ${height - 30} ${x + 16} ${height - 30} ${x + 7} ${height}`; // to itself
    path.setAttribute("d", t === query ? loop : `M${to} ${height} C${to} ${rise} ${x} ${rise} ${x} ${height}`);
    path.setAttribute("stroke-width", (0.5 + 6 * weights[t]).toFixed(2));
    path.setAttribute("stroke-opacity", (0.2 + 0.8 * Math.sqrt(weights[t])).toFixed(2));
    svg.append(path);
  }
  $("arcs-scroll").scrollLeft = to - widthOf($("arcs-scroll"), 2000) * 0.7;
}

// logit lens

function renderLens() {
  const { n_layer, n_embd } = data.config;
  const t = state.chosen - view.start;
  const T = view.ids.length;
  const layers = Array.from({ length: n_layer + 1 }, (_, layer) => layer);
  const nameOf = (layer) => (layer === 0 ? "embeddings" : `block ${layer - 1}`);
  const norms = layers.map((layer) => view.norm(layer, t));
  const longest = largest(norms);
  const next = view.ids[t + 1];
  $("lens").replaceChildren(
    el("caption", { class: "small muted" }, "After ", tokenElement("span", view.ids[t]), `, position ${t}`),
    ...layers.map((layer) => {
      const cells = view.lens(layer, t).map(({ id, p }) => {
        const attributes = { class: `chip ${id === next ? "next" : ""}`, "--weight": 100 * p, "data-id": id, "data-p": p };
        return el("td", attributes, label(id), el("small", {}, percent(p)));
      });
      const length = el("span", { class: "norm", "aria-hidden": true });
      length.style.width = `${(5 * norms[layer]) / longest}rem`;
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, nameOf(layer)),
        ...cells,
        el("td", { "data-norm": norms[layer] }, length, norms[layer].toFixed(1)),
      );
    }),
  );
  const columns = isLive ? Math.max(8, Math.min(64, Math.floor(LENS_PRODUCTS / (tokenizer.size * n_embd * (n_layer + 1))))) : T;
  const from = Math.max(0, Math.min(T - columns, t - Math.floor(columns / 2)));
  const places = Array.from({ length: Math.min(columns, T - from) }, (_, i) => from + i);
  const row = (title, classes, of) => el("tr", { class: classes }, el("th", { scope: "row" }, title), ...places.map(of));
  $("lens-grid").replaceChildren(
    row("text", "text", (place) => el("td", { class: place === t ? "chosen" : "" }, label(view.ids[place]).slice(0, 8))),
    ...layers.map((layer) =>
      row(nameOf(layer), "", (place) => {
        const { id, p } = view.lens(layer, place)[0];
        return el(
          "td",
          { "--weight": 100 * p, class: `${view.ids[place + 1] === id ? "right" : ""} ${place === t ? "chosen" : ""}` },
          label(id).slice(0, 8),
        );
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
const words = data.words ?? [];

let lengths = null;
const embedding = (id) => view.model.wte.subarray(id * data.config.n_embd, (id + 1) * data.config.n_embd);

// Tokens by their cosine with a vector: [{id, cosine}], the nearest first.
function nearest(vector, size) {
  lengths ??= Float64Array.from({ length: tokenizer.size }, (_, id) => Math.hypot(...embedding(id)) || 1);
  const own = Math.hypot(...vector) || 1;
  const cosines = new Float64Array(tokenizer.size);
  const C = data.config.n_embd;
  const { wte } = view.model;
  for (let id = 0; id < cosines.length; id++) {
    let sum = 0;
    for (let i = 0; i < C; i++) sum += wte[id * C + i] * vector[i];
    cosines[id] = sum / own / lengths[id];
  }
  return Array.from(ranked(cosines).subarray(0, size), (id) => ({ id, cosine: cosines[id] }));
}

function neighbors(id) {
  if (isLive)
    return nearest(embedding(id), 13)
      .filter((other) => other.id !== id)
      .slice(0, 12);
  const row = view._occurring.indexOf(id);
  const size = view._nearest.shape[1];
  if (row < 0) return [];
  const all = Array.from({ length: size }, (_, i) => ({
    id: view._nearest[row * size + i],
    cosine: view._cosines[row * size + i],
  }));
  return all.filter((other) => other.id !== id).slice(0, 12);
}

// The tokens nearest to a - b + c, of three ids: [{id, cosine}].
function sum(a, b, c) {
  if (isLive)
    return nearest(
      embedding(a).map((value, i) => value - embedding(b)[i] + embedding(c)[i]),
      10,
    );
  const size = words.length;
  const terms = [
    [a, 1],
    [b, -1],
    [c, 1],
  ].map(([id, sign]) => [words.indexOf(id), sign * view._word_norms[words.indexOf(id)]]);
  const cosine = (i, j) => view._gram[i * size + j] / 32767;
  let square = 0;
  for (const [i, x] of terms) for (const [j, y] of terms) square += x * y * cosine(i, j);
  const own = Math.sqrt(square);
  const all = words.map((id, d) => ({
    id,
    cosine: terms.reduce((total, [i, x]) => total + x * cosine(i, d), 0) / own,
  }));
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
  const id = state.near ?? allIds()[state.chosen];
  const found = neighbors(id);
  $("nearest-name").replaceChildren("Nearest to ", tokenElement("span", id));
  $("nearest").replaceChildren(...(found.length ? similarBars(found) : [el("li", {}, "only for tokens of the text")]));
  drawMap(id, found);
}

function drawMap(id, found) {
  const size = widthOf($("map").parentElement, 500);
  const ctx = context($("map"), size, size);
  const { ids, xy } = embeddings;
  const all = ids.length <= MAP_LABELS;
  let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < ids.length; i++) {
    left = Math.min(left, xy[2 * i]);
    right = Math.max(right, xy[2 * i]);
    top = Math.min(top, xy[2 * i + 1]);
    bottom = Math.max(bottom, xy[2 * i + 1]);
  }
  const pad = 24;
  const inText = new Set(view.ids);
  const near = new Set(found.slice(0, 8).map((other) => other.id));
  embeddings.points = Array.from(ids, (_, i) => [
    pad + ((xy[2 * i] - left) / (right - left || 1)) * (size - 2 * pad),
    pad + ((xy[2 * i + 1] - top) / (bottom - top || 1)) * (size - 2 * pad),
  ]);
  ctx.font = `${all ? 13 : 11}px ${mono}`;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  const [pale, dot] = ids.length > MAP_DENSE ? [0.12, 2] : [0.35, 3];
  const colors = [color("muted", all ? 0.95 : pale), color("ink", 0.95), color("accent", 1), color("warm", 1)];
  const levels = Array.from(ids, (other) => (other === id ? 3 : near.has(other) ? 2 : inText.has(other) ? 1 : 0));
  colors.forEach((style, level) => {
    ctx.fillStyle = style; // the chosen token comes last, above the others
    if (level === 3) ctx.font = `bold 16px ${mono}`;
    embeddings.points.forEach(([x, y], i) => {
      if (levels[i] !== level) return;
      if (all || level) ctx.fillText(label(ids[i]), x, y);
      else ctx.fillRect(x - dot / 2, y - dot / 2, dot, dot);
    });
  });
  const shares = embeddings.shares.map(percent);
  $("map-note").textContent =
    `Two principal components, ${shares[0]} and ${shares[1]} of the variance: the other ` +
    `${count(data.config.n_embd - 2)} dimensions are not in the picture. Orange: the chosen token; blue: its nearest.`;
  const names = found.slice(0, 5).map((other) => label(other.id));
  const text = `Map of the embeddings of ${ids.length} tokens. Nearest to ${label(id)}: ${names.join(", ")}.`;
  $("map").setAttribute("aria-label", text);
}

function setSums() {
  const find = (text) => words.find((id) => tokenizer.decode([id]) === text);
  const example =
    ANALOGIES.map((three) => three.map(find)).find((three) => three.every((id) => id !== undefined)) ?? words.slice(0, 3);
  ["a", "b", "c"].forEach((name, i) => {
    const select = $(`word-${name}`);
    select.append(...words.map((id) => el("option", { value: id }, label(id))));
    select.value = example[i];
    select.addEventListener("change", renderSum);
  });
  $("sum-note").textContent =
    "Faded: the three themselves, which are often the nearest. The famous examples leave them out, and are picked among many " +
    "that fail." +
    (isLive ? "" : ` Among ${count(words.length)} tokens.`);
  renderSum();
}

function renderSum() {
  const three = ["a", "b", "c"].map((name) => Number($(`word-${name}`).value));
  $("sum").replaceChildren(...similarBars(sum(...three), three));
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
  const V = tokenizer.size;
  const ctx = context((table = el("canvas")), V * size, V * size);
  for (let row = 0; row < V; row++) {
    const p = tableRow(row);
    const total = counts ? totalOf(row) : 0;
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
  const V = tokenizer.size;
  const size = V <= 120 ? 11 : Math.max(1, Math.floor(1000 / V));
  const margin = V <= 120 ? 18 : 0;
  const { row, column } = cell;
  const ctx = context($("table"), margin + V * size, margin + V * size);
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
    const times = counts[row * V + column];
    const total = totalOf(row);
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
