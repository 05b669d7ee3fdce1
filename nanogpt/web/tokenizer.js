// The tokenizers of nanogpt/tokenizer.py that a page can run: tables of strings, ids, and byte-level byte-pair encodings.
"use strict";

// What splits a text into words: PATTERNS there, with \s as \p{White_Space}, which JavaScript's \s is not.
const SPACES = "\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+";
const OTHERS = " ?[^\\p{White_Space}\\p{L}\\p{N}]+";
const ENDINGS = "'(?:[sS\\u017f]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])";
const PATTERNS = {
  gpt2: `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+|${OTHERS}|${SPACES}`,
  cl100k: `${ENDINGS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|${OTHERS}[\\r\\n]*|\\p{White_Space}*[\\r\\n]+|${SPACES}`,
};

class Tokenizer {
  // description: {kind, ...} of nanogpt/page.py; bytes: Map from id to Uint8Array
  constructor(description, bytes) {
    Object.assign(this, description);
    this.bytes = bytes;
    this.words = this.pattern && new RegExp(PATTERNS[this.pattern], "gu");
    this.specialIds = new Set(Object.values(description.special));
    this.idOf = new Map(); // by the bytes of a token, each as a character
    this.longest = 1; // bytes of the longest token
    for (const [id, of] of bytes) {
      if (of.length && !this.specialIds.has(id)) this.idOf.set(latin1(of), id);
      this.longest = Math.max(this.longest, of.length);
    }
    if (description.merges) {
      this.merges = new Map(); // "left right", ids -> rank
      const pairs = description.merges;
      for (let i = 0; i < pairs.length; i += 2) this.merges.set(`${pairs[i]} ${pairs[i + 1]}`, i);
    }
  }

  // Ids of a text, {ids, missing: the first character that no token has}; `ordinary`: special tokens are text like any other.
  encode(text, ordinary = false) {
    if (this.kind === "ids") return this.encodeIds(text);
    if (this.kind === "table") return this.encodeTable(text);
    const ids = [];
    for (const part of ordinary ? [text] : this.split(text)) {
      if (!ordinary && Object.hasOwn(this.special, part)) ids.push(this.special[part]);
      else for (const [word] of part.matchAll(this.words)) ids.push(...this.encodeWord(word));
    }
    return { ids, missing: "" };
  }

  // A text in parts: special tokens, and what is between them.
  split(text) {
    const names = Object.keys(this.special).sort((a, b) => b.length - a.length);
    if (!names.length) return [text];
    const escaped = names.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    return text.split(new RegExp(`(${escaped.join("|")})`)).filter((part) => part);
  }

  encodeIds(text) {
    const words = text.split(/\s+/).filter((word) => word);
    const missing = words.find((word) => !/^\d{1,9}$/.test(word) || Number(word) >= this.size) ?? "";
    return { ids: missing ? [] : words.map(Number), missing };
  }

  // The longest match, from left to right; a character without a token is left out.
  encodeTable(text) {
    const all = utf8(text), ids = [];
    let missing = "";
    for (let i = 0; i < all.length; ) {
      let length = Math.min(this.longest, all.length - i);
      while (length > 0 && !this.idOf.has(all.slice(i, i + length))) length--;
      if (length) ids.push(this.idOf.get(all.slice(i, i + length)));
      else {
        length = 1;
        while (i + length < all.length && (all.charCodeAt(i + length) & 0xc0) === 0x80) length++;
        missing ||= fromUtf8(all.slice(i, i + length));
      }
      i += length;
    }
    return { ids, missing };
  }

  // Byte-pair encoding: merge the neighbors whose merge was learned first, until there are none.
  encodeWord(word) {
    let parts = [...utf8(word)]; // the bytes of each token so far, each as a character
    const whole = this.idOf.get(parts.join(""));
    if (!this.merges && whole !== undefined) return [whole];
    for (;;) {
      let best = -1, lowest = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.rank(parts[i], parts[i + 1]);
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) return parts.map((part) => this.idOf.get(part));
      const [left, right] = [parts[best], parts[best + 1]], merged = [];
      for (let i = 0; i < parts.length; i++) {
        if (parts[i] === left && parts[i + 1] === right) merged.push(left + parts[++i]);
        else merged.push(parts[i]);
      }
      parts = merged;
    }
  }

  // When this pair was learned: by the list of merges; in tiktoken's encodings, the id of what they make.
  rank(left, right) {
    if (!this.merges) return this.idOf.get(left + right) ?? Infinity;
    return this.merges.get(`${this.idOf.get(left)} ${this.idOf.get(right)}`) ?? Infinity;
  }

  decode(ids) {
    const parts = ids.map((id) => this.bytes.get(id) ?? []);
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(parts.flatMap((part) => [...part])));
  }
}

const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
const utf8 = (text) => latin1(new TextEncoder().encode(text));
const fromUtf8 = (bytes) => new TextDecoder().decode(Uint8Array.from(bytes, (byte) => byte.charCodeAt(0)));
