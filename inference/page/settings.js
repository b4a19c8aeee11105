// The fields of the settings, as the body of a request has them. An empty field is left to the server.

const panel = document.getElementById("settings");
const fields = [...panel.querySelectorAll("[name]")];
const numbers = fields.filter((field) => field.type === "number");
const text = (name) => fields.find((field) => field.name === name).value;
const colours = document.getElementById("colours");

export function start(onChange) {
  panel.open = matchMedia("(min-width: 52.01rem)").matches;
  const change = () => {
    document.body.classList.toggle("colours", colours.checked);
    onChange();
  };
  panel.addEventListener("input", change);
  document.getElementById("reset").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    change();
  });
  document.body.classList.toggle("colours", colours.checked);
}

export function showDefaults(defaults) {
  for (const field of numbers) field.placeholder = defaults[field.name] ?? "random";
}

export const systemMessage = () => text("system").trim();

// The settings that were made; null, with the field shown, where one can't be.
export function given() {
  const wrong = numbers.find((field) => !field.validity.valid);
  if (wrong) {
    panel.open = true;
    wrong.reportValidity();
    return null;
  }
  const made = numbers.filter((field) => field.value !== "").map((field) => [field.name, field.valueAsNumber]);
  const stop = text("stop").split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  return { ...Object.fromEntries(made), ...(stop.length && { stop }) };
}

export const saved = () => ({ colours: colours.checked, ...Object.fromEntries(fields.map(({ name, value }) => [name, value])) });

export function restore(values = {}) {
  for (const field of fields) field.value = values[field.name] ?? "";
  colours.checked = values.colours ?? true;
}
