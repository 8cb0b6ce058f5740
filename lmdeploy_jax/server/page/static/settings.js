// The settings: kept in the browser, checked as they are changed, and put into requests.

import { useKey } from "./api.js";
import { $, element } from "./dom.js";
import { openPanel } from "./panels.js";
import { loadSettings, saveSettings } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens"];
const JSON_FIELDS = {
  tools: [Array.isArray, "a list of tools"],
  schema: [(value) => value !== null && typeof value === "object" && !Array.isArray(value), "a JSON schema, an object"],
};
const CHOICES = ["key", "system", "thinking", "reasoning_effort", "stop", "theme"];
const FIELDS = [...CHOICES, ...NUMBERS, ...Object.keys(JSON_FIELDS)];

// changed: called with the name of a setting that has another value.
export function startSettings(changed) {
  const kept = loadSettings();
  for (const name of FIELDS) {
    $(name).value = kept[name] ?? "";
    $(name).addEventListener("change", () => {
      mark($(name));
      apply();
      saveSettings(Object.fromEntries(FIELDS.map((field) => [field, $(field).value])));
      changed(name);
    });
  }
  apply();
}

function apply() {
  useKey($("key").value.trim());
  document.documentElement.dataset.theme = $("theme").value;
}

// What only some models know.
export function offerThinking(card) {
  const known = card?.supported_parameters ?? [];
  $("thinking-label").hidden = !known.includes("enable_thinking");
  $("effort-label").hidden = !known.includes("reasoning_effort");
}

// Shows the first setting that cannot be sent; whether all can.
export function checkSettings() {
  const faulty = FIELDS.map($).filter((field) => mark(field));
  if (faulty.length) showSetting(faulty[0].id);
  return !faulty.length;
}

export function showSetting(name) {
  openPanel("settings");
  $(name).focus();
}

function mark(field) {
  const told = fault(field);
  field.setAttribute("aria-invalid", String(Boolean(told)));
  let note = $(`${field.id}-fault`);
  if (!note && told) {
    note = element(field.parentNode, "span", "error");
    note.id = `${field.id}-fault`;
    field.setAttribute("aria-describedby", note.id);
  }
  if (note) note.textContent = told;
  return told;
}

function fault(field) {
  if (!field.validity.valid) return field.validationMessage;
  const rule = JSON_FIELDS[field.id];
  if (!rule || !field.value.trim()) return "";
  try {
    return rule[0](JSON.parse(field.value)) ? "" : `It must be ${rule[1]}.`;
  } catch (error) {
    return `It is no JSON: ${error.message}.`;
  }
}

const given = (name) => $(name).value.trim() !== "";
const isOffered = (name) => given(name) && !$(name).parentNode.hidden;

export function systemMessages() {
  return given("system") ? [{ role: "system", content: $("system").value.trim() }] : [];
}

// A request's fields beside its messages. Call it once `checkSettings` is content.
export function requestFields() {
  const fields = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS.filter(given)) fields[name] = Number($(name).value);
  if (isOffered("thinking")) fields.enable_thinking = $("thinking").value === "on";
  if (isOffered("reasoning_effort")) fields.reasoning_effort = $("reasoning_effort").value;
  if (given("stop")) fields.stop = $("stop").value.split("\n").filter(Boolean);
  if (given("tools")) fields.tools = JSON.parse($("tools").value);
  if (given("schema")) {
    fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse($("schema").value) } };
  }
  return fields;
}
