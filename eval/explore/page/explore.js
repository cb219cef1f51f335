// The page: the picture, the query, and one panel or two. Panels send the requests; this file starts them.

import { ask, pictureAddress, pictureError, upload } from "./api.js";
import { Panel } from "./panel.js";

const byId = (id) => document.getElementById(id);

class Page {
  constructor(setup) {
    this.setup = setup;
    this.state = { picture: null, query: null };
    this.options = { over: true, scale: "head" };
    this.panels = [];
    byId("picture-note").textContent = setup.picture_note;
    byId("model-note").textContent = setup.model_note;
    setup.pictures.forEach((picture) => this.#addPicture(picture));
    this.#addPanel();
    this.#wire();
  }

  showStatus(words) {
    byId("status").textContent = words;
  }

  showProblem(words) {
    byId("problem").textContent = words;
    byId("problem").hidden = !words;
  }

  #addPicture({ id, name }, first = false) {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "picture", value: id });
    const image = Object.assign(document.createElement("img"), { src: pictureAddress(id, 128), alt: "", loading: "lazy" });
    image.addEventListener("error", () => label.classList.add("unreadable"));
    label.title = name;
    label.append(radio, image, name);
    radio.addEventListener("change", () => this.choose({ id, name }));
    byId("pictures")[first ? "prepend" : "append"](label);
    return radio;
  }

  // Show a picture; return false if it cannot be shown.
  async choose({ id, name }) {
    const image = new Image();
    image.src = pictureAddress(id, 640);
    this.choosing = image;
    try {
      await image.decode();
    } catch {
      const reason = await pictureError(image.src).catch((error) => error.message); // the image element has no message
      if (this.choosing !== image) return true; // another was chosen meanwhile
      this.showProblem(reason || `${name} cannot be shown: choose another`);
      this.showStatus("");
      return false;
    }
    if (this.choosing !== image) return true;
    this.showProblem("");
    const tall = Math.min(3, Math.max(1 / 3, image.naturalHeight / image.naturalWidth)); // at most 3:1 on the page
    this.state.picture = { id, name, image, width: 100, height: 100 * tall };
    this.state.query = null;
    this.#showQuery();
    await Promise.all(this.panels.map((panel) => panel.load()));
    return true;
  }

  async uploadFile(file) {
    this.showStatus(`uploading ${file.name}`);
    try {
      const limit = this.setup.largest_upload;
      if (file.size > limit) throw new Error(`${file.name} has more than ${limit / 2 ** 20} MiB: make it smaller`);
      const picture = await upload(file);
      const radio = this.#addPicture(picture, true);
      radio.checked = true;
      await this.choose(picture);
    } catch (error) {
      this.showProblem(error.message);
      this.showStatus("");
    }
  }

  queryChosen(query) {
    this.state.query = query;
    this.#showQuery();
    this.panels.forEach((panel) => panel.showQuery());
  }

  layerChosen(from, layer) {
    const together = byId("together").checked;
    for (const panel of this.panels) {
      if (panel === from || (together && (!panel.view || layer < panel.view.summary.depth))) panel.chooseLayer(layer);
    }
  }

  #showQuery() {
    const { query } = this.state;
    byId("query").textContent = query ? `patch at ${Math.round(100 * query.x)} %, ${Math.round(100 * query.y)} %` : "CLS";
  }

  #addPanel() {
    const panel = new Panel(this, this.panels.length);
    this.panels.push(panel);
    byId("panels").append(panel.root);
    if (this.state.picture) panel.load();
  }

  #wire() {
    byId("compare").addEventListener("change", (event) => {
      if (event.target.checked) this.#addPanel();
      else this.panels.pop().close();
    });
    byId("over").addEventListener("change", (event) => this.#option("over", event.target.checked));
    byId("scale").addEventListener("change", (event) => this.#option("scale", event.target.value));
    byId("cls").addEventListener("click", () => this.queryChosen(null));
    byId("file").addEventListener("change", (event) => {
      if (event.target.files[0]) this.uploadFile(event.target.files[0]);
      event.target.value = "";
    });
    addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    addEventListener("dragleave", () => document.body.classList.remove("dropping"));
    addEventListener("drop", (event) => {
      event.preventDefault();
      document.body.classList.remove("dropping");
      if (event.dataTransfer.files[0]) this.uploadFile(event.dataTransfer.files[0]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  #option(name, value) {
    this.options[name] = value;
    this.redraw();
  }

  redraw() {
    this.panels.forEach((panel) => panel.redraw());
  }
}

try {
  const page = new Page(await ask("setup"));
  for (const [index, picture] of page.setup.pictures.entries()) {
    document.querySelectorAll("#pictures input")[index].checked = true;
    if (await page.choose(picture)) break;
  }
} catch (error) {
  byId("problem").textContent = error.message;
  byId("problem").hidden = false;
}
