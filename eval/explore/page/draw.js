// Drawing on canvases: maps of patches, colours, curves, bars; independent of models and of the page.

const FONT = "system-ui, sans-serif";

// The ground on the page is a panel's colour (style.css); files have a white ground.
export const LIGHT = { ground: "#f6f7f9", ink: "#16202b", soft: "#566270", line: "#d5dae0", series: ["#0072b2", "#d55e00"] };
export const DARK = { ground: "#1b222a", ink: "#e7ebef", soft: "#a3afba", line: "#37424d", series: ["#56b4e9", "#e69f00"] };
export const PAPER = { ...LIGHT, ground: "#ffffff" };
export const OBJECTS = ["#e69f00", "#56b4e9", "#cc79a7"];

export function palette() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? DARK : LIGHT;
}

// Size and fill a canvas; two pixels a unit keep it sharp on dense screens.
export function prepare(canvas, width, height, colours) {
  canvas.width = Math.round(2 * width);
  canvas.height = Math.round(2 * height);
  const context = canvas.getContext("2d");
  context.setTransform(2, 0, 0, 2, 0, 0);
  context.fillStyle = colours.ground;
  context.fillRect(0, 0, width, height);
  return context;
}

export function text(context, words, x, y, colour, { size = 12, align = "left", baseline = "middle", weight = 400 } = {}) {
  context.font = `${weight} ${size}px ${FONT}`;
  context.textAlign = align;
  context.textBaseline = baseline;
  context.fillStyle = colour;
  context.fillText(words, x, y);
}

export function limits(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// A canvas of one pixel a patch: `colourOf(patch)` gives [red, green, blue, alpha].
function tiles([rows, columns], colourOf) {
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = rows;
  const context = small.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let patch = 0; patch < rows * columns; patch++) pixels.data.set(colourOf(patch), 4 * patch);
  context.putImageData(pixels, 0, 0);
  return small;
}

function place(context, small, box) {
  context.imageSmoothingEnabled = false;
  context.drawImage(small, ...box);
  context.imageSmoothingEnabled = true;
}

// Draw a map; over a picture small values are more transparent.
export function heat(context, values, grid, box, [low, high], table, over) {
  const colourOf = (patch) => {
    const share = Math.min(1, Math.max(0, (values[patch] - low) / (high - low || 1)));
    return [...table[Math.round(255 * share)], over ? 130 + 80 * share : 255];
  };
  place(context, tiles(grid, colourOf), box);
}

export function colourTiles(context, values, grid, box) {
  place(context, tiles(grid, (patch) => [values[3 * patch], values[3 * patch + 1], values[3 * patch + 2], 255]), box);
}

export function maskTiles(context, mask, grid, box, colour) {
  const channels = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  place(context, tiles(grid, (patch) => [...channels, mask[patch] ? 150 : 0]), box);
}

export function frame(context, [x, y, width, height], colour, thickness = 2) {
  context.strokeStyle = colour;
  context.lineWidth = thickness;
  const half = thickness / 2;
  context.strokeRect(x + half, y + half, width - thickness, height - thickness); // within the box
}

// Draw the colour scale with its limits.
export function scale(context, x, y, width, [low, high], table, colours) {
  for (let step = 0; step < width; step++) {
    context.fillStyle = `rgb(${table[Math.round((255 * step) / (width - 1))].join()})`;
    context.fillRect(x + step, y, 1.5, 8);
  }
  text(context, short(low), x, y + 16, colours.soft, { size: 11 });
  text(context, short(high), x + width, y + 16, colours.soft, { size: 11, align: "right" });
}

export function short(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 1000 || Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

// Draw a chart: values by layer, the current layer marked.
export function curve(context, [x, y, width, height], title, values, marked, colours, number) {
  const colour = colours.series[number];
  const [low, high] = limits(values);
  const margin = (high - low || Math.abs(high) || 1) * 0.12;
  const bottom = low - margin, top = high + margin;
  const left = x + 44, right = x + width - 10, floor = y + height - 22, ceiling = y + 22;
  const across = (layer) => (values.length === 1 ? (left + right) / 2 : left + ((right - left) * layer) / (values.length - 1));
  const up = (value) => floor - ((floor - ceiling) * (value - bottom)) / (top - bottom);
  text(context, title, x, y + 9, colours.ink, { size: 12, weight: 600 });
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  for (const value of new Set([low, high])) {
    context.beginPath();
    context.moveTo(left, up(value));
    context.lineTo(right, up(value));
    context.stroke();
    text(context, short(value), left - 6, up(value), colours.soft, { size: 11, align: "right" });
  }
  context.setLineDash([4, 4]);
  context.strokeStyle = colours.soft;
  context.beginPath();
  context.moveTo(across(marked), ceiling - 4);
  context.lineTo(across(marked), floor);
  context.stroke();
  context.setLineDash([]);
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.beginPath();
  values.forEach((value, layer) => context[layer ? "lineTo" : "moveTo"](across(layer), up(value)));
  context.stroke();
  values.forEach((value, layer) => {
    context.beginPath();
    context.arc(across(layer), up(value), layer === marked ? 5 : 3, 0, 7);
    context.fillStyle = colour;
    context.fill();
    const every = Math.ceil(values.length / 12);
    if (layer % every === 0) text(context, String(layer), across(layer), floor + 12, colours.soft, { size: 11, align: "center" });
  });
}

export function bars(context, [x, y, width], rows, colours) {
  const height = 26, label = Math.min(150, width * 0.4);
  rows.forEach(({ name, share }, index) => {
    const at = y + index * height;
    text(context, fitted(context, name, label - 8), x, at + 12, colours.ink, { size: 12 });
    context.fillStyle = colours.line;
    context.fillRect(x + label, at + 4, width - label - 46, 16);
    context.fillStyle = colours.series[0];
    context.fillRect(x + label, at + 4, (width - label - 46) * share, 16);
    text(context, `${(100 * share).toFixed(1)} %`, x + width, at + 12, colours.soft, { size: 12, align: "right" });
  });
}

function fitted(context, words, width) {
  context.font = `400 12px ${FONT}`;
  if (context.measureText(words).width <= width) return words;
  let kept = words;
  while (kept && context.measureText(`${kept}…`).width > width) kept = kept.slice(0, -1);
  return `${kept}…`;
}
