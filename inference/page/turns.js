// One prompt and what was written for it, on the page. All of it is text, never markup.

import { tokenElement, watch } from "./likelihood.js";

const element = (tag, className, text = "") => {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
};

export class TurnView {
  // `actions` are the buttons below: {label: function}.
  constructor(mode, { prompt, answer }, actions) {
    this.answer = answer;
    this.element = element("article", "");
    this.element.dataset.mode = mode;
    this.text = element("div", "answer");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "What the model wrote; the arrow keys go through its tokens");
    this.tail = document.createTextNode("");
    this.text.append(this.tail);
    this.shown = 0;
    this.failure = element("p", "failure");
    this.failure.setAttribute("role", "alert");
    this.footer = element("footer", "");
    this.note = element("p", "soft");
    this.footer.append(this.note);
    for (const [label, act] of Object.entries(actions)) {
      const button = element("button", "", label);
      button.type = "button";
      button.addEventListener("click", () => act(button));
      this.footer.append(button);
    }
    this.element.append(element("div", "prompt", prompt), this.text, this.failure, this.footer);
    watch(this.text);
    this.update();
  }

  update() {
    const { text, parts, length, note, failure } = this.answer;
    this.tail.before(...parts.slice(this.shown).map(tokenElement));
    this.shown = parts.length;
    this.tail.data = text.slice(length);
    this.note.textContent = note;
    this.failure.textContent = failure;
    this.failure.hidden = !failure;
  }

  set writing(value) {
    this.element.classList.toggle("writing", value);
    this.element.setAttribute("aria-busy", value);
    this.footer.hidden = value;
  }
}
