// The GPT and the bigram model of model.py, in plain JavaScript, for one text at a time: idx, T ids -> a row of logits each.
// Shapes as there: T tokens, C channels, V vocabulary size, nh heads, hs = C / nh; a matrix is one Float64Array, row by row
// (twice as fast in JavaScript as Float32Array).
"use strict";

class Linear {
  constructor(weights, name) {
    this.weight = weights[`${name}.weight`]; // (out, in)
    this.bias = weights[`${name}.bias`]; // (out), or undefined
  }

  // x (T, in) -> x @ weight.T + bias, (T, out); two outputs and four rows at a time, so that each number is read less often
  forward(x, T) {
    const { weight, bias } = this;
    const out = weight.shape[0], size = weight.shape[1];
    const y = new Float64Array(T * out);
    const whole = T - (T % 4);
    for (let o = 0; o < out; o += 2) {
      const row = o * size, other = o + 1 < out ? row + size : row;
      for (let t = 0; t < whole; t += 4) {
        const r0 = t * size, r1 = r0 + size, r2 = r1 + size, r3 = r2 + size;
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0, u0 = 0, u1 = 0, u2 = 0, u3 = 0;
        for (let i = 0; i < size; i++) {
          const w = weight[row + i], v = weight[other + i];
          const x0 = x[r0 + i], x1 = x[r1 + i], x2 = x[r2 + i], x3 = x[r3 + i];
          s0 += w * x0;
          s1 += w * x1;
          s2 += w * x2;
          s3 += w * x3;
          u0 += v * x0;
          u1 += v * x1;
          u2 += v * x2;
          u3 += v * x3;
        }
        const place = t * out + o;
        y[place] = s0;
        y[place + out] = s1;
        y[place + 2 * out] = s2;
        y[place + 3 * out] = s3;
        if (other === row) continue;
        y[place + 1] = u0;
        y[place + out + 1] = u1;
        y[place + 2 * out + 1] = u2;
        y[place + 3 * out + 1] = u3;
      }
    }
    for (let t = whole; t < T; t++) {
      for (let o = 0; o < out; o++) {
        let sum = 0;
        for (let i = 0; i < size; i++) sum += weight[o * size + i] * x[t * size + i];
        y[t * out + o] = sum;
      }
    }
    return bias ? y.map((value, i) => value + bias[i % out]) : y;
  }
}

class LayerNorm {
  constructor(weights, name) {
    this.weight = weights[`${name}.weight`];
    this.bias = weights[`${name}.bias`];
  }

  forward(x, T) {
    const C = this.weight.length, y = new Float64Array(T * C);
    for (let t = 0; t < T; t++) {
      const row = x.subarray(t * C, (t + 1) * C);
      let mean = 0, variance = 0;
      for (const value of row) mean += value / C;
      for (const value of row) variance += (value - mean) ** 2 / C;
      const scale = 1 / Math.sqrt(variance + 1e-5);
      for (let i = 0; i < C; i++) y[t * C + i] = (row[i] - mean) * scale * this.weight[i] + (this.bias ? this.bias[i] : 0);
    }
    return y;
  }
}

class CausalSelfAttention {
  constructor(config, weights, name) {
    this.c_attn = new Linear(weights, `${name}.c_attn`);
    this.c_proj = new Linear(weights, `${name}.c_proj`);
    this.n_head = config.n_head;
    this.k = new Float64Array(config.block_size * config.n_embd); // the KV cache: (block_size, C) each
    this.v = new Float64Array(config.block_size * config.n_embd);
    this.att = Array.from({ length: config.n_head }, () => []); // [head][query]: its weights, one for each key up to itself
  }

  // x (T, C), the tokens after the first `position` -> (T, C)
  forward(x, T, position) {
    const { k, v, n_head } = this;
    const C = x.length / T, hs = C / n_head;
    const qkv = this.c_attn.forward(x, T); // (T, 3 C)
    for (let t = 0; t < T; t++) {
      k.set(qkv.subarray((3 * t + 1) * C, (3 * t + 2) * C), (position + t) * C);
      v.set(qkv.subarray((3 * t + 2) * C, (3 * t + 3) * C), (position + t) * C);
    }
    const y = new Float64Array(T * C);
    for (let head = 0; head < n_head; head++) {
      for (let t = 0; t < T; t++) {
        const keys = position + t + 1; // query i attends to keys 0 to i
        const scores = new Float64Array(keys), q = 3 * t * C + head * hs, out = t * C + head * hs;
        for (let j = 0; j < keys; j++) {
          const key = j * C + head * hs;
          let sum = 0;
          for (let i = 0; i < hs; i++) sum += qkv[q + i] * k[key + i];
          scores[j] = sum / Math.sqrt(hs);
        }
        const att = softmax(scores);
        for (let j = 0; j < keys; j++) {
          const value = j * C + head * hs;
          for (let i = 0; i < hs; i++) y[out + i] += att[j] * v[value + i];
        }
        this.att[head][position + t] = att;
      }
    }
    return this.c_proj.forward(y, T);
  }
}

class MLP {
  constructor(config, weights, name) {
    this.c_fc = new Linear(weights, `${name}.c_fc`);
    this.gelu = config.gelu === "tanh" ? geluTanh : geluErf;
    this.c_proj = new Linear(weights, `${name}.c_proj`);
  }

  forward(x, T) {
    return this.c_proj.forward(this.c_fc.forward(x, T).map(this.gelu), T); // (T, C)
  }
}

class Block {
  constructor(config, weights, name) {
    this.ln_1 = new LayerNorm(weights, `${name}.ln_1`);
    this.attn = new CausalSelfAttention(config, weights, `${name}.attn`);
    this.ln_2 = new LayerNorm(weights, `${name}.ln_2`);
    this.mlp = new MLP(config, weights, `${name}.mlp`);
  }

  forward(x, T, position) {
    x = add(x, this.attn.forward(this.ln_1.forward(x, T), T, position));
    return add(x, this.mlp.forward(this.ln_2.forward(x, T), T));
  }
}

class GPT {
  // vocabSize: tokens of the tokenizer, of which the model's vocabulary may have more, as padding
  constructor(config, weights, vocabSize) {
    this.config = config;
    this.vocabSize = vocabSize;
    this.wte = weights["transformer.wte.weight"]; // (V, C)
    this.wpe = weights["transformer.wpe.weight"]; // (block_size, C)
    this.h = Array.from({ length: config.n_layer }, (_, i) => new Block(config, weights, `transformer.h.${i}`));
    this.ln_f = new LayerNorm(weights, "transformer.ln_f");
    this.lm_head = new Linear({ "lm_head.weight": this.wte }, "lm_head"); // tied to the token embedding
    this.ids = []; // the window: the tokens that the model sees
    this.logits = []; // a row of V for each of them
    this.residual = this.h.concat(null).map(() => []); // [layer][token]: (C), after the embeddings and after each block
  }

  // Compute what the last block_size of idx lack; the tokens that they share with the last call, from the first on, are kept.
  forward(idx) {
    const C = this.config.n_embd, ids = idx.slice(-this.config.block_size);
    let position = 0;
    while (position < ids.length && ids[position] === this.ids[position]) position++;
    const T = ids.length - position;
    this.ids = ids;
    this.logits.length = Math.min(this.logits.length, ids.length);
    if (T === 0) return;

    // embed tokens and positions
    let x = new Float64Array(T * C);
    for (let t = 0; t < T; t++) {
      const token = ids[position + t] * C, place = (position + t) * C;
      for (let i = 0; i < C; i++) x[t * C + i] = this.wte[token + i] + this.wpe[place + i];
    }

    // the blocks
    this.keep(0, x, T, position);
    this.h.forEach((block, layer) => {
      x = block.forward(x, T, position);
      this.keep(layer + 1, x, T, position);
    });

    // logits
    const logits = this.lm_head.forward(this.ln_f.forward(x, T), T); // (T, V)
    const V = this.config.vocab_size;
    for (let t = 0; t < T; t++) this.logits[position + t] = logits.subarray(t * V, t * V + this.vocabSize);
  }

  keep(layer, x, T, position) {
    const C = x.length / T;
    for (let t = 0; t < T; t++) this.residual[layer][position + t] = x.slice(t * C, (t + 1) * C);
  }

  attention(layer, head, query) {
    return this.h[layer].attn.att[head][query];
  }

  // Logit lens: the likeliest tokens if this layer were the last one.
  lens(layer, position, count) {
    const logits = this.lm_head.forward(this.ln_f.forward(this.residual[layer][position], 1), 1).subarray(0, this.vocabSize);
    return likeliest(logits, count);
  }

  norm(layer, position) {
    return Math.hypot(...this.residual[layer][position]);
  }
}

class Bigram {
  constructor(config, weights, vocabSize) {
    this.config = config;
    this.vocabSize = vocabSize;
    this.token_embedding_table = weights["token_embedding_table.weight"]; // (V, V)
    this.ids = [];
    this.logits = [];
  }

  forward(idx) {
    const V = this.config.vocab_size;
    this.ids = idx.slice();
    this.logits = idx.map((id) => this.token_embedding_table.subarray(id * V, id * V + this.vocabSize));
  }
}

const add = (x, y) => x.map((value, i) => value + y[i]);

const geluTanh = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const geluErf = (x) => 0.5 * x * (1 + erf(x / Math.SQRT2));

// Error function, to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const y = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - y * Math.exp(-x * x));
}

function largest(values) {
  let max = -Infinity;
  for (const value of values) if (value > max) max = value;
  return max;
}

function softmax(values) {
  const max = largest(values), y = values.map((value) => Math.exp(value - max));
  let sum = 0;
  for (const value of y) sum += value;
  return y.map((value) => value / sum);
}

// log(sum(exp(values)))
function logSumExp(values) {
  const max = largest(values);
  let sum = 0;
  for (const value of values) sum += Math.exp(value - max);
  return max + Math.log(sum);
}

// The ids of all logits, from the likeliest on; equal ones by id.
function ranked(logits) {
  return Int32Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
}

// The `count` likeliest tokens: [{id, p}].
function likeliest(logits, count) {
  const total = logSumExp(logits), best = [];
  for (let id = 0; id < logits.length; id++) {
    if (best.length === count && logits[id] <= logits[best[count - 1]]) continue;
    const place = best.findIndex((other) => logits[id] > logits[other]);
    best.splice(place < 0 ? best.length : place, 0, id);
    best.length = Math.min(best.length, count);
  }
  return best.map((id) => ({ id, p: Math.exp(logits[id] - total) }));
}

// What sample_next of model.py draws from: temperature, then top-k, then top-p; 0 turns either off, temperature 0 is greedy.
// choices: {ids, logits} from the likeliest on, of `size` tokens; `rest(temperature)` is the log-sum-exp of those left out.
// Returns {scaled: logits / temperature, k: kept by top-k, kept: of these by top-p, p: their probabilities, rest: the others'}.
function distribution(choices, temperature, topK, topP) {
  const count = choices.logits.length;
  if (temperature < 1e-5) return { scaled: Float64Array.from(choices.logits), k: 1, kept: 1, p: [1], rest: 0 };
  const scaled = Float64Array.from(choices.logits, (logit) => logit / temperature);
  const all = topK === 0 || topK >= choices.size;
  const k = all ? count : Math.min(topK, count);
  const others = all && choices.size > count ? choices.rest(temperature) : -Infinity;
  let p = softmax(Float64Array.from([...scaled.subarray(0, k), others])); // the last: the rest
  let kept = p.length;
  if (topP > 0 && topP < 1) {
    let before = 0; // total probability of the more likely tokens
    for (kept = 0; kept < p.length && before < topP; kept++) before += p[kept];
    p = p.map((value, i) => (i < kept ? value / before : 0));
  }
  return { scaled, k, kept: Math.min(kept, k), p: p.subarray(0, Math.min(kept, k)), rest: p[k] };
}

// One draw by the Gumbel-max trick, as in sample_next: argmax(logits / temperature + noise). `random` gives numbers in (0, 1).
function draw(scaled, kept, random) {
  const noise = Float64Array.from({ length: kept }, () => -Math.log(-Math.log(random())));
  let best = 0;
  for (let i = 1; i < kept; i++) if (scaled[i] + noise[i] > scaled[best] + noise[best]) best = i;
  return { best, noise };
}

// A random generator that can be seeded: mulberry32 (Ettinger 2017).
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}
