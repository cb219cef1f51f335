// The page: the picture, the query, and one or two panels. Panels send the requests; this file triggers them.

import { ask, pictureAddress, upload } from "./api.js";
import { dark } from "./draw.js";
import { Panel } from "./panel.js";

const byId = (id) => document.getElementById(id);

function showProblem(words) {
  byId("problem").textContent = words;
  byId("problem").hidden = !words;
  if (words) byId("status").textContent = "";
}

class Page {
  constructor(setup) {
    this.setup = setup;
    this.picture = null;
    this.query = null; // a point as fractions of the picture's sides; null for CLS
    this.panels = [];
    byId("picture-note").textContent = setup.picture_note;
    byId("model-note").textContent = setup.model_note;
    setup.pictures.forEach((picture) => this.#addPicture(picture));
    this.#wire();
    this.#fitPanels();
  }

  showStatus(words) {
    byId("status").textContent = words;
  }

  // Settings of the maps, read when used: after going back to the page, a browser restores its controls.
  get choices() {
    return { table: this.setup.colours, over: byId("over").checked };
  }

  #addPicture({ id, name }, where = "append") {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "picture", value: id });
    const image = Object.assign(document.createElement("img"), { alt: "", loading: "lazy", draggable: false });
    image.src = pictureAddress(id, 128);
    image.addEventListener("error", () => label.classList.add("unreadable"));
    label.title = name;
    label.append(radio, image, name);
    radio.addEventListener("change", () => {
      this.uploading = null;
      this.choose({ id, name });
    });
    byId("pictures")[where](label);
  }

  #radio(id) {
    return document.querySelector(`#pictures [value="${id}"]`);
  }

  // Show a picture; return false if it cannot be shown.
  async choose({ id, name }) {
    this.choosing?.abort();
    const { signal } = (this.choosing = new AbortController());
    this.#radio(id).checked = true;
    showProblem("");
    try {
      const image = await createImageBitmap(await ask("picture", { picture: id, size: 640 }, { signal }));
      signal.throwIfAborted();
      const ratio = Math.min(3, Math.max(1 / 3, image.height / image.width)); // limited to 3:1 on the page
      this.picture = { id, name, image, ratio };
    } catch (error) {
      if (error.name === "AbortError") return true; // another picture was chosen meanwhile
      showProblem(error.message);
      return false;
    }
    this.#setQuery(null);
    this.panels.forEach((panel) => panel.load());
    return true;
  }

  // Upload a picture, and show it unless another was chosen meanwhile.
  async uploadFile(file) {
    this.uploading = file;
    this.showStatus(`uploading ${file.name}`);
    try {
      const limit = this.setup.largest_upload;
      if (file.size > limit) throw new Error(`${file.name} has more than ${limit / 2 ** 20} MiB: make it smaller`);
      const picture = await upload(file);
      if (!this.#radio(picture.id)) this.#addPicture(picture, "prepend");
      if (this.uploading === file) await this.choose(picture);
    } catch (error) {
      showProblem(error.message);
    }
  }

  #setQuery(query) {
    this.query = query;
    byId("query").textContent = query ? `patch at ${Math.round(100 * query.x)} %, ${Math.round(100 * query.y)} %` : "CLS";
  }

  queryChosen(query) {
    this.#setQuery(query);
    this.panels.forEach((panel) => panel.showQuery());
  }

  layerChosen(from, layer) {
    const together = byId("together").checked;
    for (const panel of this.panels) {
      if (panel === from || (together && (!panel.view || layer < panel.view.summary.depth))) panel.chooseLayer(layer);
    }
  }

  #fitPanels() {
    const count = byId("compare").checked ? 2 : 1;
    while (this.panels.length > count) this.panels.pop().close();
    while (this.panels.length < count) {
      const panel = new Panel(this, this.panels.length);
      this.panels.push(panel);
      byId("panels").append(panel.root);
      panel.load();
    }
  }

  #wire() {
    const redraw = () => this.panels.forEach((panel) => panel.redraw());
    for (const source of [byId("over"), dark]) source.addEventListener("change", redraw);
    byId("compare").addEventListener("change", () => this.#fitPanels());
    byId("cls").addEventListener("click", () => this.queryChosen(null));
    byId("file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.uploadFile(target.files[0]);
      target.value = "";
    });
    addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.toggle("dropping", event.dataTransfer.types.includes("Files"));
    });
    addEventListener("dragleave", () => document.body.classList.remove("dropping"));
    addEventListener("drop", (event) => {
      event.preventDefault(); // also for text, which the browser might open
      document.body.classList.remove("dropping");
      if (event.dataTransfer.files[0]) this.uploadFile(event.dataTransfer.files[0]);
    });
  }
}

try {
  const page = new Page(await ask("setup"));
  for (const picture of page.setup.pictures) {
    if (await page.choose(picture)) break;
  }
} catch (error) {
  showProblem(error.message);
}
