// A prompt and its continuation, as it is written. What the model says is text, never markup.
const [model, form, prompt, write, stop, text] =
  ["model", "form", "prompt", "write", "stop", "text"].map((id) => document.getElementById(id));
let running = null;

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    held += part.value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice("data: ".length));
  }
}

async function go(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  [write.disabled, stop.disabled, text.textContent] = [true, false, prompt.value];
  try {
    const body = JSON.stringify({ prompt: prompt.value, stream: true });
    const headers = { "content-type": "application/json" };
    const response = await fetch("v1/completions", { method: "POST", headers, body, signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      text.textContent += chunk.choices[0]?.text ?? "";
    }
  } catch (error) {
    if (error.name !== "AbortError") text.textContent += `\n${error.message}`;
  } finally {
    [write.disabled, stop.disabled, running] = [false, true, null];
  }
}

form.addEventListener("submit", go);
stop.addEventListener("click", () => running?.abort());
const found = await fetch("v1/models");
if (found.ok) model.textContent = (await found.json()).data[0].id;
