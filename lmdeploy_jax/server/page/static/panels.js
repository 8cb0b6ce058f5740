// The two panels at the sides. On a narrow window they lie over the messages, one at a time.

import { $ } from "./dom.js";

const PANELS = ["conversations", "settings"];
const narrow = matchMedia("(max-width: 56rem)");

export function startPanels() {
  for (const name of PANELS) {
    $(`show-${name}`).addEventListener("click", () => ($(name).hidden ? openPanel(name) : closePanel(name)));
  }
  const fit = () => setOpen("conversations", !narrow.matches);
  narrow.addEventListener("change", fit);
  fit();
  document.querySelector("main").addEventListener("click", closeOverlay);
}

function setOpen(name, open) {
  $(name).hidden = !open;
  $(`show-${name}`).setAttribute("aria-expanded", String(open));
}

export function openPanel(name) {
  if (narrow.matches) PANELS.forEach((other) => setOpen(other, false));
  setOpen(name, true);
  if (narrow.matches) $(name).querySelector("input, button").focus();
}

function closePanel(name) {
  setOpen(name, false);
  $(`show-${name}`).focus();
}

// Whether a panel lay over the messages.
export function closeOverlay() {
  const over = narrow.matches && PANELS.find((name) => !$(name).hidden);
  if (over) closePanel(over);
  return Boolean(over);
}
