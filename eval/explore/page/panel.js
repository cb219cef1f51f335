// A panel: one model with its menu, layer and figures. A new request cancels the previous one of its kind. Figures name
// the layer and the query of the answer that they show.

import { ask } from "./api.js";
import { PAPER, palette } from "./draw.js";
import { FIGURES, queryName } from "./figures.js";

const FILE_WIDTH = 1000; // of a saved row of figures, in units of 2 pixels (draw.js)
const PAUSE = 150; // milliseconds without a change before MaskCut is requested
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

const copyOf = (template) => document.getElementById(template).content.firstElementChild.cloneNode(true);

function asCsv(rows) {
  const cell = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
}

export class Panel {
  constructor(page, number) {
    this.page = page;
    this.root = copyOf("panel");
    this.root.setAttribute("aria-label", `Model ${number + 1}`);
    this.view = null;
    this.layer = null; // the chosen layer; that of the view may lag behind
    this.requests = {};
    this.errors = {};
    this.find = (selector) => this.root.querySelector(selector);
    this.select = this.find(".model");
    this.slider = this.find(".layer");
    this.#fillModels(number);
    this.select.addEventListener("change", () => this.load());
    this.slider.addEventListener("input", () => this.page.layerChosen(this, Number(this.slider.value)));
    this.cards = FIGURES.flatMap((figures) => {
      const cards = figures.map((figure) => this.#card(figure, figures.length === 1 ? FILE_WIDTH : FILE_WIDTH / 2));
      const row = document.createElement("div");
      row.append(...cards.map((card) => card.root));
      this.find(".figures").append(row);
      return cards;
    });
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.find(".choice")); // as wide as the figures; drawing does not change its height
  }

  close() {
    this.#cancel();
    this.observer.disconnect();
    this.root.remove();
  }

  #fillModels(number) {
    const { models } = this.page.setup;
    models.forEach(({ label, group }, index) => {
      let heading = [...this.select.children].find((child) => child.label === group);
      if (!heading) this.select.append((heading = Object.assign(document.createElement("optgroup"), { label: group })));
      heading.append(new Option(label, index));
    });
    this.select.value = Math.min(number, models.length - 1);
  }

  #card(figure, fileWidth) {
    const root = copyOf("figure");
    root.dataset.figure = figure.name;
    root.hidden = true;
    root.querySelector("h2").textContent = figure.title;
    const [canvas, buttons] = [root.querySelector("canvas"), root.querySelectorAll("button")];
    for (const button of buttons) {
      const kind = button.className;
      button.setAttribute("aria-label", `Save ${figure.title} as ${kind.toUpperCase()}`);
      button.addEventListener("click", () => this.#save(figure, kind, fileWidth));
      if (kind === "csv" && !figure.rows) button.remove();
    }
    canvas.addEventListener("click", ({ offsetX, offsetY }) => {
      figure.click?.(this, { x: offsetX / canvas.clientWidth, y: offsetY / canvas.clientHeight }, canvas);
    });
    if (figure.name === "picture") {
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      canvas.addEventListener("keydown", (event) => this.#moveQuery(event));
    }
    return { figure, root, canvas, buttons };
  }

  #moveQuery(event) {
    if (event.key === "Escape") this.page.queryChosen(null);
    const step = STEPS[event.key];
    if (!step || !this.view) return;
    event.preventDefault();
    const [rows, columns] = this.view.summary.grid;
    const [row, column] = this.#cellAt(this.page.query ?? { x: 0.5, y: 0.5 });
    const [y, x] = [(row + step[0] + 0.5) / rows, (column + step[1] + 0.5) / columns];
    if (Math.min(x, y) > 0 && Math.max(x, y) < 1) this.page.queryChosen({ x, y });
  }

  // Return the row and column of a point.
  #cellAt({ x, y }) {
    return this.view.summary.grid.map((count, axis) => {
      return Math.min(count - 1, Math.max(0, Math.floor([y, x][axis] * count)));
    });
  }

  #cancel() {
    Object.values(this.requests).forEach((request) => request.abort());
  }

  // Run a request. Its error stays on the panel until a request of its kind succeeds, or until the next load.
  async #request(kind, work) {
    this.requests[kind]?.abort();
    const { signal } = (this.requests[kind] = new AbortController());
    const about = { model: this.select.value, picture: this.page.picture.id };
    try {
      await work((path, parameters) => ask(path, { ...about, ...parameters }, { signal }));
      this.#showError(kind, "");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#showError(kind, error.message);
      if (kind === "summary") this.#empty();
    }
  }

  #showError(kind, words) {
    this.errors[kind] = words;
    const messages = new Set(Object.values(this.errors).filter(Boolean));
    this.find(".fault").textContent = [...messages].join(" ");
    this.find(".fault").hidden = !messages.size;
  }

  get loading() {
    return this.root.hasAttribute("aria-busy");
  }

  // Load another model or picture. Meanwhile the old figures are dimmed and cannot be saved.
  async load() {
    const { picture, setup } = this.page;
    if (!picture) return;
    this.#cancel();
    this.errors = {};
    this.root.setAttribute("aria-busy", "true");
    delete this.root.dataset.shown;
    this.redraw();
    await this.#request("summary", async (answer) => {
      const model = this.select.value;
      const summary = await answer("summary");
      this.view = { model, label: setup.models[model].label, picture, summary, attention: null, components: {} };
      this.root.removeAttribute("aria-busy");
      const { depth, heads, parameters, image_size } = summary;
      this.find(".facts").textContent =
        `${depth} layers, ${heads} heads, ${parameters.toLocaleString("en")} parameters, ${image_size} px`;
      this.find(".untrained").hidden = !setup.models[model].untrained;
      this.slider.max = depth - 1;
      this.#showLayer(Math.min(this.layer ?? summary.layer, depth - 1));
      const { components } = this.view; // of this load, even if another is shown when the answers arrive
      this.#request("components", async (answer) => {
        for (const which of ["all", "parts"]) {
          components[which] = (await answer("components", { which })).layers;
          this.redraw();
        }
      });
    });
  }

  #empty() {
    this.view = null;
    this.root.removeAttribute("aria-busy");
    this.cards.forEach(({ root }) => (root.hidden = true));
    for (const name of [".facts", ".layer-number"]) this.find(name).textContent = "";
    this.find(".untrained").hidden = true;
    this.page.showStatus("");
  }

  chooseLayer(layer) {
    this.layer = layer;
    if (!this.loading && this.view) this.#showLayer(layer);
  }

  #showLayer(layer) {
    Object.assign(this.view, { layer, masks: null });
    this.slider.value = layer;
    this.find(".layer-number").textContent = `${layer} of 0 to ${this.slider.max}`;
    this.showQuery();
    const { view } = this;
    this.#request("masks", async (answer) => {
      await new Promise((done) => setTimeout(done, PAUSE));
      view.masks = { ...(await answer("masks", { layer })), layer };
      this.redraw();
    });
  }

  showQuery() {
    const { view } = this;
    if (this.loading || !view) return;
    const { query } = this.page;
    const { label, layer, summary } = view;
    const [row, column] = query ? this.#cellAt(query) : [];
    const patch = (view.patch = query ? row * summary.grid[1] + column : null);
    this.redraw();
    this.#request("attention", async (answer) => {
      const lacks = patch === null && !summary.has_cls;
      view.attention = lacks ? null : { ...(await answer("attention", { layer, patch })), layer, patch };
      this.redraw();
      this.root.dataset.shown = [view.model, view.picture.id, layer, patch ?? "cls"].join("/");
      this.page.showStatus(`${label}${lacks ? " has no CLS token" : `: layer ${layer}, attention of ${queryName(view, patch)}`}`);
    });
  }

  redraw() {
    const { view } = this;
    if (!view) return;
    const drawn = this.cards.filter(({ figure, root, canvas, buttons }) => {
      const missing = figure.missing?.(view);
      const ready = Boolean(figure.ready(view));
      canvas.hidden = Boolean(missing) || !(ready || figure.early);
      root.hidden = canvas.hidden && !missing;
      buttons.forEach((button) => (button.disabled = this.loading || !ready));
      const caption = missing || (canvas.hidden ? "" : (figure.caption?.(view) ?? ""));
      root.querySelector(".caption").textContent = caption;
      canvas.setAttribute("aria-label", `${figure.title}. ${caption}`);
      return !canvas.hidden;
    });
    const colours = { ...palette(), ...this.page.choices };
    for (const { figure, root, canvas } of drawn) {
      figure.draw(view, canvas, colours, Math.max(200, root.clientWidth)); // measured when the whole row is shown
    }
  }

  #save(figure, kind, width) {
    const { label, picture } = this.view;
    const words = [figure.name, label, picture.name, figure.about?.(this.view)]; // taken now: a PNG is written later
    const name = words.filter(Boolean).join("_").replace(/[^\w.-]+/g, "-");
    const download = (blob) => {
      if (!blob) return this.#showError("save", "The browser cannot save a picture this large.");
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${name}.${kind}` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    };
    if (kind === "csv") return download(new Blob([asCsv(figure.rows(this.view))], { type: "text/csv" }));
    const canvas = document.createElement("canvas");
    figure.draw(this.view, canvas, { ...PAPER, ...this.page.choices }, width);
    canvas.toBlob(download);
  }
}
