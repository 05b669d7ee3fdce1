// Where the numbers come from: a model in the page, or a text computed beforehand; and the tokens with their bytes.
"use strict";

// arrays from nanogpt/page.py

function unpack(packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, int16: Int16Array, uint32: Uint32Array, float32: Float32Array };
  const array = new kinds[packed.dtype](bytes.buffer);
  array.shape = packed.shape;
  return array;
}

// Weights in 16 bits: each row has a scale.
function unpackWeights({ whole, scales }) {
  const all = unpack(whole);
  const steps = unpack(scales);
  const size = all.length / steps.length;
  const array = new Float64Array(all.length);
  array.shape = whole.shape;
  for (let row = 0, i = 0; row < steps.length; row++) {
    for (const end = i + size; i < end; i++) array[i] = all[i] * steps[row];
  }
  return array;
}

function readTokens({ ids, lengths, bytes }) {
  const found = new Map();
  const all = unpack(bytes);
  const sizes = unpack(lengths);
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
    const weights = Object.fromEntries(Object.entries(data.weights).map(([name, packed]) => [name, unpackWeights(packed)]));
    this.model = new (isGPT ? GPT : Bigram)(data.config, weights, tokenizer.size);
    this.lenses = new Map(); // "layer token position" -> likeliest tokens, as long as the text before is the same
  }

  update(ids) {
    const before = this.model.ids;
    this.latest = null; // what choices() has returned
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
    if (this.latest?.t === t) return this.latest;
    const logits = this.model.logits[t];
    const ids = ranked(logits);
    this.latest = { t, ids, logits: Float64Array.from(ids, (id) => logits[id]), size: ids.length, rest: () => -Infinity };
    return this.latest;
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
    const size = this._choices.shape[1];
    const stops = this._rest.shape[1];
    return {
      ids: this._choices.subarray(t * size, (t + 1) * size),
      logits: Float64Array.from(this._top.subarray(t * size, (t + 1) * size)),
      size: tokenizer.size,
      rest: (temperature) => this._rest[t * stops + Math.round(temperature * 20) - 1],
    };
  }

  lens(layer, t) {
    const [, T, size] = this._lens.shape;
    const first = (layer * T + t) * size;
    return Array.from({ length: size }, (_, i) => ({ id: this._lens_ids[first + i], p: this._lens[first + i] }));
  }

  attention(layer, head, query) {
    const [, heads, cells] = this._attention.shape;
    const row = (layer * heads + head) * cells + (query * (query + 1)) / 2;
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

// A token as a person can read it: spaces and line breaks by a sign, bytes that are no text as \x.., the invisible by number.
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
      text = hex(bytes)
        .map((byte) => `\\x${byte}`)
        .join("");
    }
    labels.set(id, text || "∅");
  }
  return labels.get(id);
}
const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0"));
const endsLine = (id) => tokenBytes.get(id)?.at(-1) === 10;
