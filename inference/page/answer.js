// What the model has written: the text, and the parts of it whose probability is known.

export class Answer {
  constructor(saved = {}) {
    this.text = saved.text ?? "";
    this.parts = saved.parts ?? []; // {text, logprob, top}, which together are the beginning of the text
    this.note = saved.note ?? "";
    this.failure = saved.failure ?? "";
    this.length = this.parts.reduce((sum, part) => sum + part.text.length, 0); // of the parts
    this.waiting = [];
    this.broken = null; // tokens that together make one character
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  toJSON() {
    const { text, parts, note, failure } = this;
    return { text, parts, note, failure };
  }

  add({ text, tokens }) {
    this.text += text;
    for (const { bytes, logprob, top } of tokens) {
      const piece = this.decoder.decode(new Uint8Array(bytes), { stream: true });
      const part = { text: piece, logprob: logprob + (this.broken?.logprob ?? 0), top: this.broken?.top ?? top };
      this.broken = piece ? null : part;
      if (piece) this.waiting.push(part);
    }
    this.place(false);
  }

  end() {
    this.place(true);
    this.waiting = [];
  }

  // A token may come before the last of its text, and a stop text may cut that off.
  place(ended) {
    while (this.waiting.length) {
      const rest = this.text.slice(this.length);
      const [part] = this.waiting;
      const begins = part.text.startsWith(rest);
      if (begins && !ended && rest.length < part.text.length) return;
      this.waiting.shift();
      const text = begins ? rest : part.text;
      if (!text || !rest.startsWith(text)) continue; // a special token has no text
      this.parts.push({ ...part, text });
      this.length += text.length;
    }
  }
}
