// How messages look.

import { textOf, imagesOf } from "./conversation.js";
import { button, copyBy, count, element, grow, onEnter } from "./dom.js";
import { picture } from "./images.js";
import { Markdown } from "./markdown.js";

const LEAST_SECONDS = 0.05;  // of an answer, for which a rate can be told
const NAMES = { user: "You", assistant: "Assistant", tool: "Result of the call" };

export function viewOf(parent, message) {
  return message.role === "assistant" ? new AnswerView(parent, message) : new MessageView(parent, message);
}

// A user's message, or a call's result.
export class MessageView {
  constructor(parent, message) {
    this.message = message;
    this.box = element(parent, "article", `message ${message.role}`);
    this.box.setAttribute("aria-label", NAMES[message.role]);
    element(this.box, "p", "who", message.info?.model ? `${NAMES.assistant} (${message.info.model})` : NAMES[message.role]);
    this.body = element(this.box, "div", "body");
    this.foot = element(this.box, "div", "foot");
    this.fill();
  }

  fill() {
    const images = imagesOf(this.message.content);
    const row = images.length ? element(this.body, "div", "images") : null;
    for (const url of images) picture(row, url);
    const text = textOf(this.message.content);
    if (text) element(this.body, "div", this.message.role === "tool" ? "tool" : "text plain", text);
  }

  // actions: [label, what to do with the button] pairs. isLeftOut: whether the model does not see the message.
  refresh(actions, isLeftOut) {
    this.box.classList.toggle("left-out", isLeftOut);
    this.foot.replaceChildren();
    for (const [kind, text] of this.notes(isLeftOut)) element(this.foot, "span", kind, text);
    for (const [label, act] of actions) {
      const made = button(this.foot, label, () => act(made));
    }
  }

  notes(isLeftOut) {
    const { error, stopped } = this.message.info ?? {};
    return [
      ...(error ? [["error", error]] : []),
      ...(stopped ? [["figures", "Stopped."]] : []),
      ...(isLeftOut ? [["figures", "There was no answer, so this is no part of the conversation any more."]] : []),
    ];
  }

  edit(save) {
    const field = element(this.body, "textarea", "edit");
    this.body.replaceChildren(field);
    field.setAttribute("aria-label", "Message");
    field.value = textOf(this.message.content);
    const cancel = () => { this.body.replaceChildren(); this.fill(); };
    const done = () => field.value.trim() && save(field.value.trim());
    onEnter(field, done);
    field.addEventListener("input", () => grow(field));
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      cancel();
    });
    button(this.body, "Send", done);
    button(this.body, "Cancel", cancel);
    grow(field);
    field.focus();
  }
}

// An answer, whole or while it comes.
export class AnswerView extends MessageView {
  fill() {
    const { content, info } = this.message;
    this.showRest(this.message, secondsOf(info?.thought));
    if (content) this.showText().finish(content);
  }

  // All but the text.
  showRest({ reasoning_content: thought, tool_calls: calls = [] }, summary) {
    if (thought) this.showThought(thought, summary);
    calls.forEach((call, i) => this.showCall(call, i));
  }

  // Show what has come so far; `changed` is called whenever there is more to see.
  update(answer, changed) {
    const { phase, thought, message } = answer;
    this.showPhase(phase);
    this.showRest(message, phase === "thinking" ? `Thinking… ${Math.floor(thought)} s` : secondsOf(thought));
    if (phase === "writing") this.foldThought();
    if (message.content) (this.text ?? this.showText()).update(message.content, changed);
    changed();
  }

  async finish(message) {
    this.message = message;
    this.progress?.remove();
    this.showRest(message, secondsOf(message.info.thought));
    if (message.content) this.foldThought();
    if (message.content) await (this.text ?? this.showText()).finish(message.content);
  }

  showPhase(phase) {
    if (phase === "reading" && !this.progress) this.progress = element(this.body, "p", "figures waiting", "Reading the prompt");
    if (phase !== "reading") this.progress?.remove();
  }

  showText() {
    return (this.text = new Markdown(this.body));
  }

  showThought(thought, summary) {
    if (!this.details) {
      this.details = element(this.body, "details", "reasoning");
      this.summary = element(this.details, "summary", "");
      this.summary.addEventListener("click", () => { this.isUsers = true; });
      this.thought = new Text();
      element(this.details, "div", "plain").append(this.thought);
      this.details.open = !this.message.info?.usage && !this.message.content;
    }
    this.summary.textContent = summary;
    this.thought.appendData(thought.slice(this.thought.length));
  }

  // Unless the user has opened or closed it.
  foldThought() {
    if (this.details && !this.isUsers) this.details.open = false;
  }

  showCall(call, i) {
    this.calls ??= [];
    this.calls[i] ??= element(this.body, "div", "tool");
    this.calls[i].textContent = `${call.function.name}(${call.function.arguments})`;
  }

  notes(isLeftOut) {
    const { finish, usage } = this.message.info ?? {};
    return [
      ...(finish === "length" ? [["notice", "Cut at the limit of new tokens, or the end of the context."]] : []),
      ...super.notes(isLeftOut),
      ...(usage ? [["figures", figures(usage, this.message.info)]] : []),
    ];
  }
}

const secondsOf = (seconds) => (seconds === undefined ? "Reasoning" : `Thought for ${seconds.toFixed(1)} s`);

// Tokens a second count from the first one on: what comes before is the prompt's time.
function figures({ prompt_tokens: prompt, completion_tokens: tokens, ...usage }, { untilFirst, seconds }) {
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const parts = [`${count(prompt, "prompt token")}${cached ? ` (${cached} cached)` : ""}`, count(tokens, "token")];
  if (untilFirst !== undefined) parts.push(`first after ${untilFirst.toFixed(2)} s`);
  if (tokens > 1 && seconds > LEAST_SECONDS) parts.push(`${((tokens - 1) / seconds).toFixed(0)} tokens/s`);
  return parts.join(", ");
}

export const copyAction = (message) => ["Copy", (pressed) => copyBy(pressed, textOf(message.content))];
