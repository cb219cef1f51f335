// The figures of a panel. Each has a name, a title, a caption, a drawing, rows for a CSV file and words for file names,
// all made from the panel's view: { model, label, picture, summary, layer, patch, attention, masks, components }.
// Attention and masks contain their layer, and are null until the server answers. `colours` is a palette of draw.js
// with the page's settings: colour map (table), maps over the picture (over).

import * as draw from "./draw.js";

const GAP = 10, TITLE = 22;
const OBJECTS = [[230, 159, 0], [86, 180, 233], [204, 121, 167]];

// Return the boxes of `count` pictures with titles, in rows of equal length if possible, and the total height.
function layout(view, count, width, smallest) {
  const most = Math.max(2, Math.floor((width + GAP) / (smallest + GAP)));
  const rows = Math.ceil(count / most), columns = Math.ceil(count / rows);
  const cell = (width - GAP * (columns - 1)) / columns, tall = cell * view.picture.ratio, step = tall + TITLE + GAP;
  const box = (_, index) => [(index % columns) * (cell + GAP), Math.floor(index / columns) * step + TITLE, cell, tall];
  return { boxes: Array.from({ length: count }, box), height: rows * step };
}

function byPatch({ summary: { grid: [rows, columns] } }, rowOf) {
  return Array.from({ length: rows * columns }, (_, patch) => rowOf(patch, Math.floor(patch / columns), patch % columns));
}

export function queryName({ summary: { grid } }, patch) {
  return patch === null ? "CLS" : `patch ${Math.floor(patch / grid[1])}, ${patch % grid[1]}`;
}

// Draw a frame that is visible on any background.
function outline(context, [x, y, width, height], colour) {
  draw.frame(context, [x - 1, y - 1, width + 2, height + 2], "#000000", 4);
  draw.frame(context, [x, y, width, height], colour, 2);
}

function queryFrame({ summary: { grid } }, patch, context, [x, y, width, height]) {
  if (patch === null) return;
  const [wide, tall] = [width / grid[1], height / grid[0]];
  const corner = [x + (patch % grid[1]) * wide - 2, y + Math.floor(patch / grid[1]) * tall - 2];
  outline(context, [...corner, wide + 4, tall + 4], "#ffffff");
}

// Prepare a canvas for the picture, with space below it; return its context and the picture's box.
function prepared(view, canvas, colours, width, below = 0) {
  const height = width * view.picture.ratio;
  return [draw.prepare(canvas, width, height + below, colours), [0, 0, width, height]];
}

// Draw a map. Over the picture, small values are more transparent.
function map(view, context, values, box, [low, high], { table, over }) {
  if (over) context.drawImage(view.picture.image, ...box);
  draw.tiles(context, view.summary.grid, box, (patch) => {
    const share = (values[patch] - low) / (high - low || 1);
    return [...table[Math.round(255 * share)], over ? 130 + 80 * share : 255];
  });
}

const picture = {
  name: "picture",
  title: "Picture",
  ready: () => true,
  caption: () => "Click a patch, or move with the arrow keys, to see what it attends to. Escape returns to CLS.",
  click: (panel, point) => panel.page.queryChosen(point),
  draw(view, canvas, colours, width) {
    const [context, box] = prepared(view, canvas, colours, width);
    context.drawImage(view.picture.image, ...box);
    queryFrame(view, view.patch, context, box);
  },
};

const attention = {
  name: "attention",
  title: "Attention of each head",
  ready: (view) => view.attention,
  missing: (view) =>
    !view.summary.has_cls && view.patch === null && "This model has no CLS token: click a patch of the picture.",
  caption: (view) =>
    `Attention of ${queryName(view, view.attention.patch)}, softmax over patches, in layer ${view.attention.layer}` +
    (view.attention.layer === view.summary.layer ? ", the default layer." : ".") +
    " Each map has its own colour scale, from its least to its largest value.",
  about: (view) => `layer${view.attention.layer}_${queryName(view, view.attention.patch)}`,
  draw(view, canvas, colours, width) {
    const { heads, patch } = view.attention;
    const { boxes, height } = layout(view, heads.length, width, 130);
    const context = draw.prepare(canvas, width, height, colours);
    heads.forEach((values, head) => {
      const range = draw.limits(values);
      const [x, y, side] = boxes[head];
      draw.text(context, `head ${head}`, x, y - 10, colours.ink, { size: 13, weight: 600 });
      draw.text(context, `to ${draw.short(range[1])}`, x + side, y - 10, colours.soft, { align: "right" });
      map(view, context, values, boxes[head], range, colours);
      queryFrame(view, patch, context, boxes[head]);
    });
  },
  rows: (view) => [
    ["layer", "query", "head", "row", "column", "attention"],
    ...view.attention.heads.flatMap((values, head) => {
      const about = [view.attention.layer, queryName(view, view.attention.patch), head];
      return byPatch(view, (patch, row, column) => [...about, row, column, values[patch]]);
    }),
  ],
};

const components = (which, title, caption) => ({
  name: `components-${which}`,
  title,
  ready: (view) => view.components[which],
  caption: () => caption,
  about: () => "layers",
  layout: (view, width) => layout(view, view.summary.depth, width, 110),
  click(panel, point, canvas) {
    const [x, y] = [(point.x * canvas.width) / 2, (point.y * canvas.height) / 2]; // in units of the drawing
    const inside = ([left, top, wide, tall]) => x >= left && x <= left + wide && y >= top && y <= top + tall;
    const layer = this.layout(panel.view, canvas.width / 2).boxes.findIndex(inside);
    if (layer >= 0) panel.page.layerChosen(panel, layer);
  },
  draw(view, canvas, colours, width) {
    const { boxes, height } = this.layout(view, width);
    const context = draw.prepare(canvas, width, height, colours);
    view.components[which].forEach((values, layer) => {
      const [x, y] = boxes[layer];
      const marked = layer === view.layer;
      const [colour, weight] = marked ? [colours.ink, 700] : [colours.soft, 400];
      const colourOf = (patch) => [...values.slice(3 * patch, 3 * patch + 3), 255];
      draw.text(context, `layer ${layer}`, x, y - 10, colour, { size: 13, weight });
      if (values) draw.tiles(context, view.summary.grid, boxes[layer], colourOf);
      else draw.text(context, "too few patches", x + 4, y + 14, colours.soft, { size: 13 });
      if (marked) draw.frame(context, boxes[layer], colours.series[1], 4);
    });
  },
  rows: (view) => [
    ["layer", "row", "column", "red", "green", "blue"],
    ...view.components[which].flatMap((values, layer) => {
      const rowOf = (patch, row, column) => [layer, row, column, ...values.slice(3 * patch, 3 * patch + 3)];
      return values ? byPatch(view, rowOf) : [];
    }),
  ],
});

const masks = {
  name: "masks",
  title: "MaskCut",
  early: true, // draw the picture before the masks arrive, so that the layout stays
  ready: (view) => view.masks,
  caption(view) {
    if (!view.masks) return "…";
    const count = view.masks.masks.length;
    return `${count} ${count === 1 ? "object" : "objects"} found by normalised cuts in layer ${view.masks.layer}.`;
  },
  about: (view) => `layer${view.masks.layer}`,
  draw(view, canvas, colours, width) {
    const [context, whole] = prepared(view, canvas, colours, width);
    context.drawImage(view.picture.image, ...whole);
    if (!view.masks) return;
    const { grid } = view.summary;
    const [side, tall] = [whole[2] / grid[1], whole[3] / grid[0]]; // of a patch
    view.masks.masks.forEach((mask, object) =>
      draw.tiles(context, grid, whole, (patch) => [...OBJECTS[object], mask[patch] ? 150 : 0]),
    );
    view.masks.boxes.forEach(([left, top, right, bottom], object) => {
      const [x, y] = [left * side, top * tall];
      const colour = `rgb(${OBJECTS[object]})`;
      outline(context, [x, y, (right - left) * side, (bottom - top) * tall], colour);
      const label = x + 20 * object; // boxes may share a corner
      context.fillStyle = "#000000";
      context.fillRect(label, y, 18, 18);
      draw.text(context, String(object + 1), label + 9, y + 10, colour, { size: 13, weight: 700, align: "center" });
    });
  },
  // Objects are numbered from 1, and 0 is no object. Boxes are in patches, with right and bottom exclusive.
  rows: (view) => [
    ["layer", "row", "column", "object", "left", "top", "right", "bottom"],
    ...byPatch(view, (patch, row, column) => {
      const object = view.masks.masks.findIndex((mask) => mask[patch]);
      return [view.masks.layer, row, column, 1 + object, ...(view.masks.boxes[object] ?? ["", "", "", ""])];
    }),
  ],
};

const sparsity = {
  name: "sparsity",
  title: "Non-zeros",
  ready: (view) => view.summary.patch_sparsity,
  missing: (view) => !view.summary.patch_sparsity && "No ISTA in this model, so its tokens are dense.",
  about: (view) => `layer${view.layer}`,
  caption: (view) => `Share of non-zero entries of each token's code in layer ${view.layer}. Lower is sparser.`,
  draw(view, canvas, colours, width) {
    const [context, box] = prepared(view, canvas, colours, width, 28);
    const values = view.summary.patch_sparsity[view.layer];
    const range = draw.limits(values);
    map(view, context, values, box, range, colours);
    draw.scale(context, box[3] + 4, range, colours);
  },
  rows: (view) => [
    ["layer", "row", "column", "nonzero_share"],
    ...view.summary.patch_sparsity.flatMap((values, layer) =>
      byPatch(view, (patch, row, column) => [layer, row, column, values[patch]]),
    ),
  ],
};

const curves = {
  name: "curves",
  title: "Compression and sparsity",
  ready: ({ summary }) => summary.coding_rate || summary.sparsity,
  missing: (view) =>
    !curves.ready(view) && "This model has no ISTA, and no subspaces, because its queries and keys are separate.",
  about: () => "layers",
  caption: () => "R^c of the subspace tokens in nats; share of non-zeros in the code. The dashed line marks the layer shown.",
  draw(view, canvas, colours, width) {
    const charts = [
      ["R^c, nats", view.summary.coding_rate, colours.series[0]],
      ["non-zeros", view.summary.sparsity, colours.series[1]],
    ].filter(([, values]) => values);
    const context = draw.prepare(canvas, width, 170 * charts.length, colours);
    charts.forEach(([title, values, colour], index) =>
      draw.curve(context, [4, 170 * index, width - 8, 164], title, values, view.layer, colour, colours),
    );
  },
  rows: ({ summary: { depth, coding_rate, sparsity } }) => [
    ["layer", "coding_rate", "nonzero_share"],
    ...Array.from({ length: depth }, (_, layer) => [layer, coding_rate?.[layer] ?? "", sparsity?.[layer] ?? ""]),
  ],
};

const classes = {
  name: "classes",
  title: "Most probable classes",
  ready: (view) => view.summary.top,
  missing: (view) => !view.summary.top && "This model has no classifier.",
  draw(view, canvas, colours, width) {
    const { top } = view.summary;
    draw.bars(draw.prepare(canvas, width, 26 * top.length + 6, colours), [2, 2, width - 4], top, colours);
  },
  rows: (view) => [
    ["rank", "class", "name", "probability"],
    ...view.summary.top.map((entry, index) => [index + 1, entry.class, entry.name, entry.probability]),
  ],
};

// The figures in rows.
export const FIGURES = [
  [picture, masks, sparsity],
  [attention],
  [components("all", "Components 2 to 4", "Of all patches, as red, green and blue. Click a layer to select it.")],
  [components("parts", "Parts", "Components 1 to 3 of the foreground; the rest is black. Click a layer to select it.")],
  [curves, classes],
];
