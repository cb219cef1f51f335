// The figures of a panel. A figure has a name, a title, a caption, a drawing, rows for a CSV file and words for its file
// name, all made from a panel's view: { model, label, picture, summary, layer, patch, attention, masks, components, table,
// options }. Attention and masks name their layer, and are null before the answer.

import * as draw from "./draw.js";

const GAP = 10, TITLE = 22;

// Return boxes of `count` pictures with titles, in rows.
function cells(view, count, columns, width, gap = GAP, title = TITLE) {
  const cell = (width - gap * (columns - 1)) / columns;
  const height = (cell * view.picture.height) / view.picture.width;
  const rows = Math.ceil(count / columns);
  const boxes = Array.from({ length: count }, (_, index) => [
    (index % columns) * (cell + gap),
    Math.floor(index / columns) * (height + title + gap) + title,
    cell,
    height,
  ]);
  return { boxes, height: rows * (height + title + gap) };
}

// Return the number of columns that fits a width, with rows of one length if possible.
function columnsFor(count, width, smallest = 130) {
  const most = Math.max(2, Math.floor((width + GAP) / (smallest + GAP)));
  for (let rows = 1; rows < count; rows++) {
    const columns = Math.ceil(count / rows);
    if (columns <= most) return columns;
  }
  return 1;
}

function byPatch([rows, columns], rowOf) {
  return Array.from({ length: rows * columns }, (_, patch) => rowOf(patch, Math.floor(patch / columns), patch % columns));
}

export function queryName(view, patch) {
  if (patch === null) return "CLS";
  return `patch ${Math.floor(patch / view.summary.grid[1])}, ${patch % view.summary.grid[1]}`;
}

function queryFrame(view, patch, context, box) {
  if (patch === null) return;
  const [rows, columns] = view.summary.grid;
  const [width, height] = [box[2] / columns, box[3] / rows];
  const corner = [box[0] + (patch % columns) * width, box[1] + Math.floor(patch / columns) * height];
  draw.frame(context, [corner[0] - 3, corner[1] - 3, width + 6, height + 6], "#000000", 4);
  draw.frame(context, [corner[0] - 2, corner[1] - 2, width + 4, height + 4], "#ffffff", 2);
}

// Prepare a canvas for the picture, with space below it; return its context and the picture's box.
function prepared(view, canvas, colours, width, below = 0) {
  const height = (width * view.picture.height) / view.picture.width;
  return [draw.prepare(canvas, width, height + below, colours), [0, 0, width, height]];
}

const picture = {
  name: "picture",
  title: "Picture",
  ready: () => true,
  caption: () => "Click a patch to see what it attends to: or arrow keys here; Escape for CLS.",
  draw(view, canvas, colours, width) {
    const [context, box] = prepared(view, canvas, colours, width);
    context.drawImage(view.picture.image, ...box);
    queryFrame(view, view.patch, context, box);
  },
};

const attention = {
  name: "attention",
  title: "Attention, every head",
  wide: true,
  ready: (view) => view.attention,
  missing: (view) => (view.summary.has_cls || view.patch !== null ? "" : "This model has no CLS token: click a patch of the picture."),
  caption: (view) =>
    `Softmax over patches, in layer ${view.attention.layer}, of ${queryName(view, view.attention.patch)}` +
    (view.attention.layer === view.summary.layer ? "; the layer that the paper looks at." : "."),
  about: (view) => `layer${view.attention.layer}_${queryName(view, view.attention.patch)}`,
  draw(view, canvas, colours, width) {
    const { heads, patch } = view.attention;
    const { boxes, height } = cells(view, heads.length, columnsFor(heads.length, width), width);
    const shared = view.options.scale === "layer" ? draw.limits(heads.flat()) : null;
    const context = draw.prepare(canvas, width, height + (shared ? 28 : 0), colours);
    heads.forEach((values, head) => {
      const range = shared || draw.limits(values);
      const [x, y, side] = boxes[head];
      draw.text(context, `head ${head}`, x, y - 10, colours.ink, { size: 13, weight: 600 });
      if (!shared) draw.text(context, `to ${draw.short(range[1])}`, x + side, y - 10, colours.soft, { align: "right" });
      if (view.options.over) context.drawImage(view.picture.image, ...boxes[head]);
      draw.heat(context, values, view.summary.grid, boxes[head], range, view.table, view.options.over);
      queryFrame(view, patch, context, boxes[head]);
    });
    if (shared) draw.scale(context, 0, height, 300, shared, view.table, colours);
  },
  rows: (view) => [
    ["layer", "query", "head", "row", "column", "attention"],
    view.attention.heads.flatMap((values, head) => {
      const about = [view.attention.layer, queryName(view, view.attention.patch), head];
      return byPatch(view.summary.grid, (patch, row, column) => [...about, row, column, values[patch]]);
    }),
  ],
};

function components(which, title, caption) {
  return {
    name: `components-${which}`,
    title,
    wide: true,
    ready: (view) => view.components[which],
    caption: () => caption,
    about: () => "layers",
    pick(view, x, y, width) {
      const { boxes } = this.layout(view, width);
      return boxes.findIndex((box) => x >= box[0] && x <= box[0] + box[2] && y >= box[1] && y <= box[1] + box[3]);
    },
    layout: (view, width) => cells(view, view.summary.depth, columnsFor(view.summary.depth, width, 110), width),
    draw(view, canvas, colours, width) {
      const { boxes, height } = this.layout(view, width);
      const context = draw.prepare(canvas, width, height, colours);
      view.components[which].forEach((values, layer) => {
        const [x, y] = boxes[layer];
        const marked = layer === view.layer;
        draw.text(context, `layer ${layer}`, x, y - 10, marked ? colours.ink : colours.soft, { size: 13, weight: marked ? 700 : 400 });
        if (values) draw.colourTiles(context, values, view.summary.grid, boxes[layer]);
        else draw.text(context, "too few patches", x + 4, y + 14, colours.soft, { size: 13 });
        if (marked) draw.frame(context, boxes[layer], colours.series[1], 4);
      });
    },
    rows: (view) => [
      ["layer", "row", "column", "red", "green", "blue"],
      view.components[which].flatMap((values, layer) =>
        values === null
          ? []
          : byPatch(view.summary.grid, (p, row, column) => [layer, row, column, ...values.slice(3 * p, 3 * p + 3)]),
      ),
    ],
  };
}

const masks = {
  name: "masks",
  title: "MaskCut",
  early: true, // draw the picture first, so that nothing moves later
  ready: (view) => view.masks,
  caption(view) {
    if (!view.masks) return "…";
    const count = view.masks.masks.length;
    return `${count} ${count === 1 ? "object" : "objects"} by normalised cuts of layer ${view.masks.layer}'s patches.`;
  },
  about: (view) => `layer${view.masks.layer}`,
  draw(view, canvas, colours, width) {
    const [context, whole] = prepared(view, canvas, colours, width);
    context.drawImage(view.picture.image, ...whole);
    if (!view.masks) return;
    const [side, tall] = [whole[2] / view.summary.grid[1], whole[3] / view.summary.grid[0]]; // of a patch
    view.masks.masks.forEach((mask, object) => draw.maskTiles(context, mask, view.summary.grid, whole, draw.OBJECTS[object]));
    view.masks.boxes.forEach(([left, top, right, bottom], object) => {
      const [x, y] = [left * side, top * tall];
      const box = [x, y, (right - left) * side, (bottom - top) * tall];
      draw.frame(context, box, "#000000", 4);
      draw.frame(context, box, draw.OBJECTS[object], 2);
      const label = x + 20 * object; // boxes may share a corner
      context.fillStyle = "#000000";
      context.fillRect(label, y, 18, 18);
      draw.text(context, String(object + 1), label + 9, y + 10, draw.OBJECTS[object], { size: 13, weight: 700, align: "center" });
    });
  },
  // Objects are numbered 1 to 3, 0 is none; boxes are in patches, right and bottom exclusive.
  rows: (view) => [
    ["layer", "row", "column", "object", "left", "top", "right", "bottom"],
    byPatch(view.summary.grid, (patch, row, column) => {
      const object = view.masks.masks.findIndex((mask) => mask[patch]);
      return [view.masks.layer, row, column, 1 + object, ...(view.masks.boxes[object] || ["", "", "", ""])];
    }),
  ],
};

const sparsity = {
  name: "sparsity",
  title: "Non-zeros",
  ready: (view) => view.summary.patch_sparsity,
  missing: (view) => (view.summary.patch_sparsity ? "" : "No ISTA in this model: its tokens are dense."),
  about: (view) => `layer${view.layer}`,
  caption: (view) => `Share of a token's entries that are not zero, after layer ${view.layer}; small is sparse.`,
  draw(view, canvas, colours, width) {
    const [context, box] = prepared(view, canvas, colours, width, 28);
    const values = view.summary.patch_sparsity[view.layer];
    const range = draw.limits(values);
    if (view.options.over) context.drawImage(view.picture.image, ...box);
    draw.heat(context, values, view.summary.grid, box, range, view.table, view.options.over);
    draw.scale(context, 0, box[3] + 4, Math.min(300, width), range, view.table, colours);
  },
  rows: (view) => [
    ["layer", "row", "column", "nonzero_share"],
    view.summary.patch_sparsity.flatMap((values, layer) =>
      byPatch(view.summary.grid, (patch, row, column) => [layer, row, column, values[patch]]),
    ),
  ],
};

const curves = {
  name: "curves",
  title: "Compression and sparsity",
  ready: (view) => view.summary.coding_rate || view.summary.sparsity,
  missing(view) {
    const some = view.summary.coding_rate || view.summary.sparsity;
    return some ? "" : "Query and key are separate in this model, so that there are no subspaces; and it has no ISTA.";
  },
  about: () => "layers",
  caption: () => "R^c of the subspace tokens, in nats; share of non-zeros after ISTA. The dashed line is the layer shown.",
  draw(view, canvas, colours, width) {
    const charts = [
      ["R^c, nats", view.summary.coding_rate, 0],
      ["non-zeros", view.summary.sparsity, 1],
    ].filter(([, values]) => values);
    const context = draw.prepare(canvas, width, 170 * charts.length, colours);
    charts.forEach(([title, values, number], index) =>
      draw.curve(context, [4, 170 * index, width - 8, 164], title, values, view.layer, colours, number),
    );
  },
  rows: (view) => [
    ["layer", "coding_rate", "nonzero_share"],
    Array.from({ length: view.summary.depth }, (_, layer) => [
      layer,
      view.summary.coding_rate?.[layer] ?? "",
      view.summary.sparsity?.[layer] ?? "",
    ]),
  ],
};

const classes = {
  name: "classes",
  title: "Most probable classes",
  ready: (view) => view.summary.top,
  missing: (view) => (view.summary.top ? "" : "This model has no classifier."),
  draw(view, canvas, colours, width) {
    const rows = view.summary.top.map(({ name, probability }) => ({ name, share: probability }));
    const context = draw.prepare(canvas, width, 26 * rows.length + 6, colours);
    draw.bars(context, [2, 2, width - 4], rows, colours);
  },
  rows: (view) => [
    ["rank", "class", "name", "probability"],
    view.summary.top.map((entry, index) => [index + 1, entry.class, entry.name, entry.probability]),
  ],
};

// The figures in rows.
export const FIGURES = [
  [picture, masks, sparsity],
  [attention],
  [components("all", "Components 2 to 4", "Of all patches, as red, green and blue. Click a layer to look at it.")],
  [components("parts", "Parts", "Components 1 to 3 of the foreground; the rest is black. Click a layer to look at it.")],
  [curves, classes],
];
