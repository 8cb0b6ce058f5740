// The list of conversations.

import { textOf, titleOf } from "./conversation.js";
import { $, button, element, onEnter } from "./dom.js";
import { latestFirst } from "./store.js";

const PENCIL = "M4 16l1-4L14 3l3 3-9 9zM12 5l3 3", BIN = "M4 6h12M8 6V4h4v2M6 6l1 11h6l1-11";

// acts: open(conversation), rename(conversation, title), remove(conversation)
export function showList(current, acts) {
  const wanted = $("search").value.trim().toLowerCase();
  $("list").replaceChildren();
  for (const conversation of latestFirst()) {
    if (says(conversation, wanted)) showItem(conversation, conversation.id === current, acts);
  }
}

function says(conversation, wanted) {
  const texts = [titleOf(conversation), ...conversation.messages.map((message) => textOf(message.content) ?? "")];
  return !wanted || texts.some((text) => text.toLowerCase().includes(wanted));
}

function showItem(conversation, isCurrent, acts) {
  const item = element($("list"), "li", isCurrent ? "current" : "");
  const title = titleOf(conversation);
  const opens = button(item, title, () => acts.open(conversation), "open");
  opens.title = title;
  if (isCurrent) opens.setAttribute("aria-current", "true");
  symbol(item, PENCIL, `Rename ${title}`, () => rename(item, conversation, acts));
  symbol(item, BIN, `Delete ${title}`, () => acts.remove(conversation));
}

function symbol(parent, path, label, act) {
  const made = button(parent, "", act, "tool-button");
  made.setAttribute("aria-label", label);
  made.title = label.split(" ")[0];
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawn.setAttribute("viewBox", "0 0 20 20");
  drawn.setAttribute("aria-hidden", "true");
  drawn.append(document.createElementNS(drawn.namespaceURI, "path"));
  drawn.firstChild.setAttribute("d", path);
  made.append(drawn);
}

function rename(item, conversation, acts) {
  item.replaceChildren();
  const field = element(item, "input");
  field.setAttribute("aria-label", "Title");
  field.value = titleOf(conversation);
  const done = (title) => acts.rename(conversation, title);
  onEnter(field, () => done(field.value.trim()));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    done(conversation.title);
  });
  field.focus();
  field.select();
}
