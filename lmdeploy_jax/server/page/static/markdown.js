// Markdown that the server renders: an answer as it grows, at most five times a second, and once as a whole.

import { markdown } from "./api.js";
import { element } from "./dom.js";

const PAUSE = 200;  // milliseconds from one rendering to the next
const MOST_CHARACTERS = 64000;  // that the server takes at once
const MOST_KEPT = 200;
const whole = new Map();  // complete texts -> HTML

export class Markdown {
  constructor(parent) {
    this.box = element(parent, "div", "text markdown");
    this.settled = element(this.box, "div");
    this.open = element(this.box, "div");
    this.lines = 0;  // of the text, for which `settled` stands
    this.text = "";
  }

  // Show a text that begins with the last one.
  update(text, changed = () => {}) {
    this.text = text.replace(/\r\n?/g, "\n");
    this.complete = false;
    this.running ??= this.follow(changed);
  }

  async follow(changed) {
    let shown = null;
    while (shown !== this.text && !this.complete) {
      shown = this.text;
      await this.renderOpen();
      changed();
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
    this.running = null;
  }

  async renderOpen() {
    const rest = this.text.split("\n").slice(this.lines).join("\n");
    const rendered = await this.ask(rest);
    if (rendered === null || this.complete) return;
    if (rendered.settled) {
      element(this.settled, "div").innerHTML = rendered.settled;
      this.lines += rendered.settled_lines;
    }
    this.open.innerHTML = rendered.open;
  }

  // Show the complete text. A long one stays as its parts were rendered.
  async finish(text) {
    this.complete = true;
    this.text = text.replace(/\r\n?/g, "\n");
    if (!whole.has(this.text)) {
      const rendered = this.text.length > MOST_CHARACTERS ? await this.inParts() : await this.ask(this.text);
      if (rendered === null) return;
      if (whole.size >= MOST_KEPT) whole.clear();
      whole.set(this.text, rendered.settled + rendered.open);
    }
    this.settled.replaceChildren();
    this.open.innerHTML = whole.get(this.text);
  }

  async inParts() {
    let [rest, settled] = [this.text, ""];
    while (rest.length > MOST_CHARACTERS) {
      const cut = rest.lastIndexOf("\n", MOST_CHARACTERS) + 1 || MOST_CHARACTERS;
      const part = await this.ask(rest.slice(0, cut));
      if (part === null) return null;
      settled += part.settled + part.open;
      rest = rest.slice(cut);
    }
    const last = await this.ask(rest);
    return last && { settled: settled + last.settled, open: last.open };
  }

  // What the server cannot render is shown as it is.
  async ask(text) {
    try {
      return text.length > MOST_CHARACTERS ? this.plain() : await markdown(text);
    } catch {
      return this.plain();
    }
  }

  plain() {
    this.settled.replaceChildren();
    this.lines = 0;
    this.open.replaceChildren();
    element(this.open, "div", "plain", this.text);
    return null;
  }
}
