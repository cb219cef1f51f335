// A panel: one model with its menu, layer and figures. A new request cancels the one before it; figures are labelled
// with the layer and the query of the answer that they show.

import { ask } from "./api.js";
import { PAPER, palette } from "./draw.js";
import { FIGURES, queryName } from "./figures.js";

const FILE_WIDTH = 1000; // of saved pictures, in units of 1/2 pixel
const PAUSE = 150; // milliseconds of rest before MaskCut is requested

function asCsv([header, rows]) {
  const cell = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return [header, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

export class Panel {
  constructor(page, number) {
    this.page = page;
    this.number = number;
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.root.setAttribute("aria-label", `Model ${number + 1}`);
    this.view = null;
    this.layer = null; // the chosen layer; the view's may lag behind
    this.requests = {};
    this.errors = {};
    this.find = (selector) => this.root.querySelector(selector);
    this.select = this.find(".model");
    this.slider = this.find(".layer");
    this.#fillModels();
    this.select.addEventListener("change", () => this.load());
    this.slider.addEventListener("input", () => this.page.layerChosen(this, Number(this.slider.value)));
    this.cards = FIGURES.flatMap((row) => this.#row(row));
    let width = 0;
    this.observer = new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - width) < 1) return; // only the width matters: drawing changes the height
      width = entry.contentRect.width;
      this.redraw();
    });
    this.observer.observe(this.root);
  }

  close() {
    this.#cancel("load", "attention", "masks", "components");
    this.observer.disconnect();
    this.root.remove();
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
    const card = { figure, root, canvas: root.querySelector("canvas"), buttons: root.querySelectorAll("button") };
    const [png, csv] = card.buttons;
    png.setAttribute("aria-label", `Save ${figure.title} as PNG`);
    csv.setAttribute("aria-label", `Save ${figure.title} as CSV`);
    png.addEventListener("click", () => this.#savePicture(figure));
    if (figure.rows) csv.addEventListener("click", () => this.#save(figure, "csv", new Blob([asCsv(figure.rows(this.view))], { type: "text/csv" })));
    else csv.remove();
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
    canvas.setAttribute("role", "application");
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

  #cancel(...kinds) {
    for (const kind of kinds) this.requests[kind]?.abort();
  }

  // Send a request; its error stays on the panel until a request of the same kind succeeds.
  async #request(kind, work) {
    this.#cancel(kind);
    const { signal } = (this.requests[kind] = new AbortController());
    try {
      await work(signal);
      this.#showError(kind, "");
      return true;
    } catch (error) {
      if (error.name !== "AbortError") this.#showError(kind, error.message);
      return error.name === "AbortError";
    }
  }

  #showError(kind, words) {
    this.errors[kind] = words;
    const messages = [...new Set(Object.values(this.errors).filter(Boolean))];
    this.find(".fault").textContent = messages.join(" ");
    this.find(".fault").hidden = !messages.length;
  }

  get loading() {
    return this.root.hasAttribute("aria-busy");
  }

  // Load another model or picture. Until then the old figures stay, dimmed, and cannot be saved.
  async load() {
    const { picture } = this.page.state;
    if (!picture) return;
    const model = this.select.value;
    this.#cancel("attention", "masks", "components");
    for (const kind of ["attention", "masks", "components"]) this.#showError(kind, "");
    this.root.setAttribute("aria-busy", "true");
    delete this.root.dataset.shown;
    this.#allowSaving();
    const loaded = await this.#request("load", async (signal) => {
      const summary = await ask("summary", { model, picture: picture.id }, signal);
      const layer = Math.min(this.layer ?? summary.layer, summary.depth - 1);
      const { label, untrained } = this.page.setup.models[model];
      this.view = { model, label, untrained, picture, summary, layer, patch: null, components: {} };
      Object.assign(this.view, { attention: null, masks: null, table: this.page.setup.colours, options: this.page.options });
      this.root.removeAttribute("aria-busy");
      this.#describe();
      this.showLayer(layer);
      this.#components();
    });
    if (!loaded) this.#empty();
  }

  #empty() {
    this.view = null;
    this.root.removeAttribute("aria-busy");
    this.cards.forEach(({ root }) => (root.hidden = true));
    this.find(".facts").textContent = "";
    this.find(".untrained").hidden = true;
  }

  #describe() {
    const { summary, untrained } = this.view;
    const size = `${summary.depth} layers, ${summary.heads} heads, ${summary.parameters.toLocaleString("en")} parameters`;
    this.find(".facts").textContent = `${size}, ${summary.image_size} px`;
    this.find(".untrained").hidden = !untrained;
    this.slider.max = summary.depth - 1;
  }

  chooseLayer(layer) {
    this.layer = layer;
    if (!this.loading && this.view) this.showLayer(layer);
  }

  showLayer(layer) {
    this.view.layer = layer;
    this.view.masks = null;
    this.slider.value = layer;
    this.find(".layer-number").textContent = `${layer} of 0 to ${this.view.summary.depth - 1}`;
    this.showQuery();
    this.#masks();
  }

  showQuery() {
    if (this.loading || !this.view) return;
    const { view } = this;
    const { layer } = view;
    const patch = (view.patch = this.#patch());
    this.redraw();
    this.#request("attention", async (signal) => {
      const about = { model: view.model, picture: view.picture.id };
      const lacks = patch === null && !view.summary.has_cls;
      view.attention = lacks ? null : { ...(await ask("attention", { ...about, layer, patch }, signal)), layer, patch };
      this.redraw();
      this.root.dataset.shown = [view.model, view.picture.id, layer, patch ?? "cls"].join("/");
      this.page.showStatus(lacks ? `${view.label} has no CLS token` : `${view.label}: layer ${layer}, attention of ${queryName(view, patch)}`);
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
    const { view } = this;
    const { layer } = view;
    this.#request("masks", async (signal) => {
      await new Promise((done) => setTimeout(done, PAUSE));
      signal.throwIfAborted();
      const found = await ask("masks", { model: view.model, picture: view.picture.id, layer }, signal);
      view.masks = { ...found, layer };
      this.redraw();
    });
  }

  #components() {
    const { view } = this;
    this.#request("components", async (signal) => {
      for (const which of ["all", "parts"]) {
        view.components[which] = (await ask("components", { model: view.model, picture: view.picture.id, which }, signal)).layers;
        this.redraw();
      }
    });
  }

  #allowSaving() {
    for (const { figure, buttons } of this.cards) {
      buttons.forEach((button) => (button.disabled = this.loading || !this.view || !figure.ready(this.view)));
    }
  }

  redraw() {
    if (!this.view) return;
    for (const { figure, root, canvas } of this.cards) {
      const missing = figure.missing?.(this.view) || "";
      const drawn = !missing && (figure.ready(this.view) || Boolean(figure.early));
      root.hidden = !missing && !drawn;
      canvas.hidden = !drawn;
      const caption = drawn ? (figure.caption?.(this.view) ?? "") : missing;
      root.querySelector(".caption").textContent = caption;
      if (!drawn) continue;
      figure.draw(this.view, canvas, palette(), Math.max(200, root.clientWidth));
      canvas.setAttribute("aria-label", `${figure.title}. ${caption}`);
    }
    this.#allowSaving();
  }

  #savePicture(figure) {
    const canvas = document.createElement("canvas");
    figure.draw(this.view, canvas, PAPER, figure.wide ? FILE_WIDTH : FILE_WIDTH / 2);
    canvas.toBlob((blob) => (blob ? this.#save(figure, "png", blob) : this.#showError("save", "the browser cannot draw a picture this large")));
  }

  #save(figure, kind, blob) {
    const words = [figure.name, this.view.label, this.view.picture.name, figure.about?.(this.view)];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${words.filter(Boolean).join("_").replace(/[^\w.-]+/g, "-")}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}
