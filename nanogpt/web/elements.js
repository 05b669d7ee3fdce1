// Elements, canvases, colours and numbers as text: what the rest of the page is made of.
"use strict";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const mono = getComputedStyle($("text")).fontFamily;
const isGPT = data.kind === "gpt";

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

// A colour of page.css as [red, green, blue], or as a string with this opacity; the browser is asked once for each theme.
const palette = new Map();
function color(name, alpha = null) {
  if (!palette.has(name)) {
    const probe = el("span");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    palette.set(
      name,
      getComputedStyle(probe)
        .color.match(/[\d.]+/g)
        .slice(0, 3)
        .map(Number),
    );
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
