// A conversation is {id, title, updated, saved, messages}. Its messages are the protocol's, and an answer's `info`
// holds what is told of it: finish, error, usage, seconds, ...

const TITLE_LENGTH = 60;

export function create() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), messages: [] };
}

export function textOf(content) {
  return Array.isArray(content) ? content.filter((part) => part.type === "text").map((part) => part.text).join("\n") : content;
}

export function imagesOf(content) {
  return Array.isArray(content) ? content.filter((part) => part.type === "image_url").map((part) => part.image_url.url) : [];
}

export function contentOf(text, images) {
  if (!images.length) return text;
  return [...images.map((url) => ({ type: "image_url", image_url: { url } })), ...(text ? [{ type: "text", text }] : [])];
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user");
  const text = first ? textOf(first.content).trim().split("\n")[0] || "Images" : "New chat";
  return text.length > TITLE_LENGTH ? `${text.slice(0, TITLE_LENGTH)}…` : text;
}

// The calls of the last message that wait for their results.
export function openCalls(messages) {
  const at = messages.findLastIndex((message) => message.role !== "tool");
  const answered = new Set(messages.slice(at + 1).map((message) => message.tool_call_id));
  return (messages[at]?.tool_calls ?? []).filter((call) => !answered.has(call.id));
}

const saysSomething = (message) => message.role !== "assistant" || message.content || message.tool_calls?.length;
const hasAnswer = (turn) => turn.at(-1).role === "assistant" && turn.at(-1).content && !turn.at(-1).tool_calls?.length;

// The messages that the model is sent. A turn that came to no answer (refused, stopped before its first word,
// a call without a result) is left out once the conversation goes on: templates want roles by turns, and
// what was refused once would be refused again.
export function sentMessages(messages) {
  const turns = [];
  for (const message of messages) {
    if (message.role === "user" || !turns.length) turns.push([]);
    turns.at(-1).push(message);
  }
  const last = turns.at(-1);
  return turns.filter((turn) => turn === last || hasAnswer(turn)).flat().filter(saysSomething);
}

export const asSent = ({ info, ...message }) => message;
