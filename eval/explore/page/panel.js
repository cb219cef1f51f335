// One model: its choice, its layer, its figures. A new question cancels the one before it.

import { ask } from "./api.js";
import { PAPER, palette } from "./draw.js";
import { FIGURES, queryName } from "./figures.js";

const FILE_WIDTH = 1000; // of saved pictures, in units of 1/2 pixel

export class Panel {
  constructor(page, number) {
    this.page = page;
    this.number = number;
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.view = null;
    this.asked = {};
    this.find = (selector) => this.root.querySelector(selector);
    this.select = this.find(".model");
    this.slider = this.find(".layer");
    this.#fillModels();
    this.select.addEventListener("change", () => this.load());
    this.slider.addEventListener("input", () => this.page.layerChosen(this, Number(this.slider.value)));
    this.cards = FIGURES.flatMap((row) => this.#row(row));
    let width = 0;
    new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - width) < 1) return; // the height follows from what is drawn
      width = entry.contentRect.width;
      this.redraw();
    }).observe(this.root);
  }

  #fillModels() {
    const groups = new Map();
    this.page.setup.models.forEach((model, index) => {
      if (!groups.has(model.group)) {
        const group = document.createElement("optgroup");
        group.label = model.group;
        groups.set(model.group, group);
        this.select.append(group);
      }
      groups.get(model.group).append(new Option(model.label, index));
    });
    this.select.value = Math.min(this.number, this.page.setup.models.length - 1);
  }

  #row(figures) {
    const row = document.createElement("div");
    this.find(".figures").append(row);
    return figures.map((figure) => {
      const card = this.#card(figure);
      row.append(card.root);
      return card;
    });
  }

  #card(figure) {
    const root = document.getElementById("figure").content.firstElementChild.cloneNode(true);
    root.dataset.figure = figure.name;
    root.hidden = true;
    root.querySelector("h2").textContent = figure.title;
    const card = { figure, root, canvas: root.querySelector("canvas") };
    root.querySelector(".png").addEventListener("click", () => this.#savePicture(card));
    const table = root.querySelector(".csv");
    if (figure.csv) table.addEventListener("click", () => this.#save(card, "csv", new Blob([figure.csv(this.view)], { type: "text/csv" })));
    else table.remove();
    if (figure.name === "picture") this.#pickPatches(card.canvas);
    if (figure.pick) card.canvas.addEventListener("click", (event) => this.#pickLayer(card, event));
    return card;
  }

  #pickLayer(card, event) {
    const layer = card.figure.pick(this.view, event.offsetX, event.offsetY, card.canvas.clientWidth);
    if (layer >= 0) this.page.layerChosen(this, layer);
  }

  #pickPatches(canvas) {
    canvas.tabIndex = 0;
    canvas.addEventListener("click", (event) => {
      this.page.queryChosen({ x: event.offsetX / canvas.clientWidth, y: event.offsetY / canvas.clientHeight });
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") this.page.queryChosen(null);
      if (!step || !this.view) return;
      event.preventDefault();
      const [rows, columns] = this.view.summary.grid;
      const at = this.page.state.query || { x: 0.5, y: 0.5 };
      const inside = (share, count, move) => (Math.min(count - 1, Math.max(0, Math.floor(share * count) + move)) + 0.5) / count;
      this.page.queryChosen({ x: inside(at.x, columns, step[0]), y: inside(at.y, rows, step[1]) });
    });
  }

  #begin(kind) {
    this.asked[kind]?.abort();
    this.asked[kind] = new AbortController();
    return this.asked[kind].signal;
  }

  async #try(work) {
    try {
      await work();
    } catch (error) {
      if (error.name === "AbortError") return;
      const fault = this.find(".fault");
      fault.textContent = error.message;
      fault.hidden = false;
      this.root.removeAttribute("aria-busy");
    }
  }

  get about() {
    return { model: this.select.value, picture: this.page.state.picture.id };
  }

  // Another model or picture.
  load() {
    const signal = this.#begin("load");
    for (const kind of ["attention", "masks", "components"]) this.asked[kind]?.abort();
    return this.#try(async () => {
      this.root.setAttribute("aria-busy", "true");
      const picture = this.page.state.picture;
      const summary = await ask("summary", this.about, signal);
      this.find(".fault").hidden = true;
      const layer = this.view ? Math.min(this.view.layer, summary.depth - 1) : summary.layer;
      this.view = { picture, summary, layer, table: this.page.setup.colours, options: this.page.options, components: {} };
      this.view.attention = this.view.masks = null;
      this.#describe();
      await this.showLayer(this.view.layer);
      this.root.removeAttribute("aria-busy");
      this.#components();
    });
  }

  #describe() {
    const { summary } = this.view;
    const size = `${summary.depth} layers, ${summary.heads} heads, ${summary.parameters.toLocaleString("en")} parameters`;
    this.find(".facts").textContent = `${size}, ${summary.image_size} px`;
    this.find(".untrained").hidden = !this.page.setup.models[this.select.value].untrained;
    this.slider.max = summary.depth - 1;
  }

  async showLayer(layer) {
    this.view.layer = layer;
    this.view.masks = null;
    this.slider.value = layer;
    this.find(".layer-number").textContent = `${layer} of 0 to ${this.view.summary.depth - 1}`;
    await this.showQuery();
    this.#masks();
  }

  showQuery() {
    const signal = this.#begin("attention");
    return this.#try(async () => {
      const { view } = this;
      view.patch = this.#patch();
      const lacks = view.patch === null && !view.summary.has_cls;
      view.attention = lacks ? null : (await ask("attention", { ...this.about, layer: view.layer, patch: view.patch }, signal)).heads;
      this.redraw();
      this.root.dataset.shown = [this.select.value, view.picture.id, view.layer, view.patch ?? "cls"].join("/");
      this.page.say(`${this.select.selectedOptions[0].label}: layer ${view.layer}, attention of ${queryName(view)}`);
    });
  }

  #patch() {
    const { query } = this.page.state;
    if (query === null) return null;
    const [rows, columns] = this.view.summary.grid;
    const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return at(query.y, rows) * columns + at(query.x, columns);
  }

  #masks() {
    const signal = this.#begin("masks");
    return this.#try(async () => {
      const { view } = this;
      const found = await ask("masks", { ...this.about, layer: view.layer }, signal);
      view.masks = found;
      this.redraw();
    });
  }

  #components() {
    const signal = this.#begin("components");
    return this.#try(async () => {
      const { view } = this;
      for (const which of ["all", "parts"]) {
        view.components[which] = (await ask("components", { ...this.about, which }, signal)).layers;
        this.redraw();
      }
    });
  }

  redraw() {
    if (!this.view) return;
    for (const { figure, root, canvas } of this.cards) {
      const ready = figure.ready(this.view);
      if (!ready && !figure.missing && root.hidden) continue;
      root.hidden = false;
      const buttons = root.querySelectorAll("button");
      buttons.forEach((button) => (button.disabled = !ready));
      canvas.hidden = !ready && Boolean(figure.missing);
      root.querySelector(".caption").textContent = ready ? figure.caption(this.view) : figure.missing || "…";
      if (!ready) continue;
      figure.draw(this.view, canvas, palette(), Math.max(200, root.clientWidth));
      canvas.setAttribute("aria-label", `${figure.title}. ${figure.caption(this.view)}`);
    }
  }

  #savePicture({ figure, root }) {
    const canvas = document.createElement("canvas");
    figure.draw(this.view, canvas, PAPER, figure.wide ? FILE_WIDTH : FILE_WIDTH / 2);
    canvas.toBlob((blob) => this.#save({ figure, root }, "png", blob), "image/png");
  }

  #save({ figure }, kind, blob) {
    const model = this.select.selectedOptions[0].label;
    const where = figure.name === "attention" ? `layer${this.view.layer}_${queryName(this.view)}` : `layer${this.view.layer}`;
    const name = [figure.name, model, this.view.picture.name, where].join("_").replace(/[^\w.-]+/g, "-");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${name}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}
