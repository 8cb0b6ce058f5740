// Small helpers for building the page.

export const $ = (id) => document.getElementById(id);

export function element(parent, tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

export function button(parent, label, act, className = "") {
  const node = element(parent, "button", className, label);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

// Enter that sends. An input method takes Enter to choose a candidate; Safari tells of it by the code alone.
export function onEnter(field, act) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    act();
  });
}

// A field as high as its text; its style sheet says how high at most.
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// What screen readers say. The messages are no live region: every piece of an answer would be read.
export function announce(text) {
  $("status").textContent = text;
}

export const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

// Without HTTPS browsers have no clipboard interface, except on localhost.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element(document.body, "textarea", "off-screen");
  field.value = text;
  field.select();
  document.execCommand("copy");
  field.remove();
}

export async function copyBy(pressed, text) {
  const label = pressed.textContent;
  await copy(text);
  pressed.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { pressed.textContent = label; }, 1500);
}
