// The page: what was asked and written, kept until the tab is closed, and the one text that is being written.

import { Answer } from "./answer.js";
import { generate, Refused, servedModel, useKey } from "./api.js";
import { hide, settle } from "./likelihood.js";
import * as settings from "./settings.js";
import { TurnView } from "./turns.js";

const [main, hint, list, composer, prompt, write, stop, status, trouble, keyForm, keyText, modes, clear, theme, system] =
  ["main", "#hint", "#turns", "#composer", "#prompt", "#write", "#stop", "#status", "#trouble", "#key", "#key-text",
    "#modes", "#clear", "#theme", "#system"].map((name) => document.querySelector(name));
const HINTS = {
  chat: "Say something, and the model answers.",
  completion: "Write how a text begins, and the model goes on with it.",
};
const turns = { chat: [], completion: [] };
let mode = "completion";
let running = null;

function save() {
  try {
    sessionStorage.setItem("page", JSON.stringify({ mode, turns, settings: settings.saved() }));
  } catch {
    // Too much to keep: what is on the page stays there, a reload brings back what was kept before.
  }
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem("page") ?? "{}");
  for (const [name, list] of Object.entries(kept.turns ?? {})) {
    turns[name] = list.map(({ prompt, answer }) => ({ prompt, answer: new Answer(answer) }));
  }
  settings.restore(kept.settings);
  return kept.mode;
}

function show(next) {
  mode = next;
  modes.querySelector(`[value=${mode}]`).checked = true;
  system.hidden = mode !== "chat";
  prompt.placeholder = mode === "chat" ? "Message" : "The beginning of a text";
  list.replaceChildren(...turns[mode].map((turn) => viewOf(turn).element));
  refresh();
  main.scrollTop = main.scrollHeight;
}

function refresh() {
  hint.textContent = turns[mode].length ? "" : HINTS[mode];
  hint.hidden = turns[mode].length > 0;
  clear.disabled = running !== null || !turns[mode].length;
  modes.disabled = running !== null;
  for (const button of list.querySelectorAll("footer button")) button.disabled = running !== null;
  const focused = [write, stop].includes(document.activeElement);
  write.hidden = running !== null;
  stop.hidden = running === null;
  if (focused) (running ? stop : write).focus();
}

function viewOf(turn) {
  return new TurnView(mode, turn, {
    Regenerate: () => redo(turn),
    ...(mode === "completion" && { Continue: () => begin(turn.prompt + turn.answer.text) }),
    Edit: () => edit(turn),
    Copy: (button) => copy(turn, button),
  });
}

function begin(text) {
  const made = settings.given();
  if (!made) return false;
  const turn = { prompt: text, answer: new Answer() };
  turns[mode].push(turn);
  const view = viewOf(turn);
  list.append(view.element);
  fill(turn, view, made);
  return true;
}

// In a chat, what came after a turn answers to it, and goes with it.
function takeBack(turn) {
  const place = turns[mode].indexOf(turn);
  turns[mode].splice(place, mode === "chat" ? Infinity : 1);
  show(mode);
}

function redo(turn) {
  if (!settings.given()) return;
  takeBack(turn);
  begin(turn.prompt);
}

function edit(turn) {
  takeBack(turn);
  save();
  prompt.value = turn.prompt;
  prompt.focus();
}

async function copy(turn, button) {
  const text = mode === "chat" ? turn.answer.text : turn.prompt + turn.answer.text;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it to copy"; // browsers lend the clipboard to HTTPS and to this machine alone
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

function bodyOf(turn, made) {
  if (mode === "completion") return { prompt: turn.prompt, logprobs: 5, ...made };
  const said = turns.chat.slice(0, turns.chat.indexOf(turn)).filter(({ answer }) => answer.text);
  const messages = said.flatMap((one) =>
    [{ role: "user", content: one.prompt }, { role: "assistant", content: one.answer.text }]);
  const opening = settings.systemMessage();
  if (opening) messages.unshift({ role: "system", content: opening });
  messages.push({ role: "user", content: turn.prompt });
  return { messages, logprobs: true, top_logprobs: 5, ...made };
}

async function fill(turn, view, made) {
  const { answer } = turn;
  running = new AbortController();
  view.writing = true;
  status.textContent = "The model writes.";
  refresh();
  scroll(true);
  const started = performance.now();
  let [finish, usage, truncated] = [null, null, false];
  try {
    for await (const part of generate(mode, bodyOf(turn, made), running.signal)) {
      finish ??= part.finish;
      usage ??= part.usage;
      truncated ||= part.truncated;
      const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
      answer.add(part);
      view.update();
      scroll(atEnd);
    }
    answer.note = noteOf(finish, usage, performance.now() - started);
  } catch (error) {
    if (error.name === "AbortError") answer.note = "stopped";
    else {
      answer.failure = error.message;
      if (!(error instanceof Refused)) console.error(error);
      if (error.status === 401) askForKey(error.message);
    }
  }
  if (truncated) answer.note += `; the beginning of the ${mode === "chat" ? "conversation" : "text"} was left out`;
  answer.end();
  running = null;
  view.update();
  view.writing = false;
  status.textContent = answer.failure ? "" : `The model has written: ${answer.text}`;
  refresh();
  scroll(main.scrollHeight - main.scrollTop - main.clientHeight < 160);
  save();
}

function noteOf(finish, usage, milliseconds) {
  const count = usage?.completion_tokens ?? 0;
  const speed = (count / (milliseconds / 1000)).toFixed(1);
  const end = finish === "length" ? ", cut at the limit of tokens" : "";
  return `${count.toLocaleString("en")} tokens, ${speed} a second${end}`;
}

function scroll(wanted) {
  if (wanted) main.scrollTop = main.scrollHeight;
}

function askForKey(message) {
  trouble.textContent = message;
  [trouble.hidden, keyForm.hidden] = [false, false];
  keyText.focus();
}

async function open() {
  let card;
  try {
    card = await servedModel();
  } catch (error) {
    if (error.status === 401) return askForKey(error.message);
    trouble.textContent = error.message;
    trouble.hidden = false;
    return;
  }
  [trouble.hidden, keyForm.hidden] = [true, true];
  const size = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(card.parameters);
  const about = [card.id, `${size} parameters`, `context of ${card.context_length.toLocaleString("en")} tokens`];
  document.getElementById("model").textContent = about.join(" · ");
  settings.showDefaults(card.defaults);
  modes.hidden = !card.chat;
  const wanted = restored ?? (card.chat ? "chat" : "completion");
  show(card.chat ? wanted : "completion");
  prompt.focus();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && prompt.value && begin(prompt.value)) prompt.value = "";
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (matchMedia("(pointer: coarse)").matches) return; // a phone has no Shift-Enter
  event.preventDefault();
  composer.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hide();
  running?.abort();
});
main.addEventListener("scroll", settle);
stop.addEventListener("click", () => running?.abort());
modes.addEventListener("change", ({ target }) => { show(target.value); save(); });
clear.addEventListener("click", () => { turns[mode] = []; show(mode); save(); prompt.focus(); });
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(keyText.value.trim());
  open();
});

const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
  || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.addEventListener("click", () => {
  const chosen = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  localStorage.setItem("theme", chosen);
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);

nameTheme();
const restored = restore();
settings.start(save);
show(restored ?? "completion");
open();
