// Tokens coloured by how sure the model was, and a small table of the alternatives to one of them.

const BOUNDS = [0.9, 0.65, 0.4, 0.2, 0.07];
const box = document.getElementById("likelihood");
const parts = new WeakMap();
let shown = null;

export function tokenElement(part) {
  const element = document.createElement("span");
  element.className = "token";
  element.textContent = part.text;
  element.tabIndex = -1;
  const probability = Math.exp(part.logprob);
  element.dataset.level = BOUNDS.filter((bound) => probability < bound).length;
  element.classList.toggle("break", part.text.includes("\n"));
  parts.set(element, part);
  return element;
}

// One stop for the tab key; the arrows go from token to token.
export function watch(answer) {
  answer.addEventListener("mouseover", ({ target }) => parts.has(target) && show(target));
  answer.addEventListener("mouseleave", () => { // which a finger does when it lets go
    if (parts.has(document.activeElement)) show(document.activeElement);
    else hide();
  });
  answer.addEventListener("focusin", ({ target }) => parts.has(target) && show(target));
  answer.addEventListener("focusout", hide);
  answer.addEventListener("keydown", (event) => {
    const way = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const first = event.target === answer && answer.querySelector(".token");
    const next = way && (first || event.target[way]);
    if (!next || !parts.has(next)) return;
    event.preventDefault();
    next.focus();
  });
}

export function hide() {
  box.hidden = true;
  shown?.removeAttribute("aria-describedby");
  shown = null;
}

// Beside its token, above or below, wherever that has been scrolled to.
export function settle() {
  if (!shown) return;
  const [place, size] = [shown.getClientRects()[0], box.getBoundingClientRect()];
  const below = place.bottom + 6 + size.height < innerHeight;
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - size.height - 6)}px`;
}

function show(element) {
  hide();
  shown = element;
  const { text, logprob, top } = parts.get(element);
  const others = top.filter(([token]) => token !== text);
  const rows = [[text, logprob, true], ...others.map(([token, value]) => [token, value, false])];
  box.replaceChildren(...rows.sort((left, right) => right[1] - left[1]).map(row));
  box.hidden = false;
  element.setAttribute("aria-describedby", box.id);
  settle();
}

function row([token, logprob, drawn]) {
  const [line, name, share, bar] = ["div", "code", "span", "i"].map((tag) => document.createElement(tag));
  const percent = 100 * Math.exp(logprob);
  line.className = drawn ? "drawn" : "";
  name.textContent = visible(token);
  share.textContent = `${percent < 0.1 ? "under 0.1" : percent.toFixed(1)} %`;
  bar.style.width = `${percent}%`;
  line.append(name, share, bar);
  return line;
}

const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
