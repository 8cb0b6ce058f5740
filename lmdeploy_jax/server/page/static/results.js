// The fields for the results of an answer's calls.

import { openCalls } from "./conversation.js";
import { button, element, grow, onEnter } from "./dom.js";

// send: called with the results as messages, once every field has one.
export function askResults(view, messages, send) {
  const box = element(view.body, "div", "results");
  const fields = openCalls(messages).map((call) => ({ call, field: resultField(box, call) }));
  if (!fields.length) return box.remove();
  const done = () => {
    const missing = fields.find(({ field }) => !field.value.trim());
    if (missing) return missing.field.focus();
    box.remove();
    send(fields.map(({ call, field }) => ({ role: "tool", tool_call_id: call.id, content: field.value })));
  };
  fields.forEach(({ field }) => onEnter(field, done));
  button(box, fields.length > 1 ? "Send results" : "Send result", done);
}

function resultField(box, call) {
  const field = element(box, "textarea", "result");
  field.rows = 2;
  field.placeholder = `Result of ${call.function.name}`;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => grow(field));
  return field;
}
