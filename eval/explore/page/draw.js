// Drawing on canvases: tiles, frames, curves and bars. Independent of models and of the page.

export const dark = matchMedia("(prefers-color-scheme: dark)");

// The background on the page is the colour of a panel (style.css); saved files have a white background.
const LIGHT = { ground: "#f6f7f9", ink: "#16202b", soft: "#566270", line: "#d5dae0", series: ["#0072b2", "#d55e00"] };
const DARK = { ground: "#1b222a", ink: "#e7ebef", soft: "#a3afba", line: "#37424d", series: ["#56b4e9", "#e69f00"] };
export const PAPER = { ...LIGHT, ground: "#ffffff" };

export function palette() {
  return dark.matches ? DARK : LIGHT;
}

// Size and fill a canvas. Two pixels per unit keep it sharp on high-resolution screens.
export function prepare(canvas, width, height, colours) {
  canvas.width = Math.round(2 * width);
  canvas.height = Math.round(2 * height);
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = colours.ground;
  context.fillRect(0, 0, width, height);
  return context;
}

// Draw one line of text, shortened with an ellipsis to the width `fit`.
export function text(context, words, x, y, colour, { size = 12, align = "left", weight = 400, fit = Infinity } = {}) {
  context.font = `${weight} ${size}px system-ui, sans-serif`;
  context.textAlign = align;
  context.textBaseline = "middle";
  context.fillStyle = colour;
  while (words.length > 1 && context.measureText(words).width > fit) words = `${words.slice(0, -2)}…`;
  context.fillText(words, x, y);
}

export function limits(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

export function short(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 1000 || Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

// Draw one tile per patch: `colourOf(patch)` returns [red, green, blue, alpha].
export function tiles(context, [rows, columns], box, colourOf) {
  const pixels = new ImageData(columns, rows);
  for (let patch = 0; patch < rows * columns; patch++) pixels.data.set(colourOf(patch), 4 * patch);
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, ...box);
  context.imageSmoothingEnabled = true;
}

// Draw a frame inside a box.
export function frame(context, [x, y, width, height], colour, thickness) {
  context.strokeStyle = colour;
  context.lineWidth = thickness;
  context.strokeRect(x + thickness / 2, y + thickness / 2, width - thickness, height - thickness);
}

// Draw the colour scale with its limits.
export function scale(context, y, [low, high], colours) {
  const width = Math.min(300, context.canvas.width / 2);
  tiles(context, [1, 256], [0, y, width, 8], (level) => [...colours.table[level], 255]);
  text(context, short(low), 0, y + 16, colours.soft, { size: 11 });
  text(context, short(high), width, y + 16, colours.soft, { size: 11, align: "right" });
}

function line(context, points, colour, thickness = 1, dashes = []) {
  context.strokeStyle = colour;
  context.lineWidth = thickness;
  context.setLineDash(dashes);
  context.beginPath();
  points.forEach((point) => context.lineTo(...point));
  context.stroke();
}

// Draw a chart of values by layer and mark the current layer.
export function curve(context, [x, y, width, height], title, values, marked, colour, colours) {
  const [low, high] = limits(values);
  const margin = (high - low || Math.abs(high) || 1) * 0.12;
  const left = x + 44, right = x + width - 10, floor = y + height - 22, ceiling = y + 22;
  const across = (layer) => left + (right - left) * (values.length === 1 ? 0.5 : layer / (values.length - 1));
  const up = (value) => floor - ((floor - ceiling) * (value - low + margin)) / (high - low + 2 * margin);
  text(context, title, x, y + 9, colours.ink, { weight: 600 });
  for (const value of new Set([low, high])) {
    line(context, [[left, up(value)], [right, up(value)]], colours.line);
    text(context, short(value), left - 6, up(value), colours.soft, { size: 11, align: "right" });
  }
  line(context, [[across(marked), ceiling - 4], [across(marked), floor]], colours.soft, 1, [4, 4]);
  line(context, values.map((value, layer) => [across(layer), up(value)]), colour, 2);
  const every = Math.ceil(values.length / 12);
  values.forEach((value, layer) => {
    context.beginPath();
    context.arc(across(layer), up(value), layer === marked ? 5 : 3, 0, 7);
    context.fillStyle = colour;
    context.fill();
    if (layer % every === 0) text(context, String(layer), across(layer), floor + 12, colours.soft, { size: 11, align: "center" });
  });
}

export function bars(context, [x, y, width], rows, colours) {
  const label = Math.min(150, width * 0.4), full = width - label - 46;
  rows.forEach(({ name, probability }, index) => {
    const at = y + 26 * index;
    text(context, name, x, at + 12, colours.ink, { fit: label - 8 });
    context.fillStyle = colours.line;
    context.fillRect(x + label, at + 4, full, 16);
    context.fillStyle = colours.series[0];
    context.fillRect(x + label, at + 4, full * probability, 16);
    text(context, `${(100 * probability).toFixed(1)} %`, x + width, at + 12, colours.soft, { align: "right" });
  });
}
