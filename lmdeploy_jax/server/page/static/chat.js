// The chat page: one conversation is shown, and at most one answer comes.

import { Answer } from "./answer.js";
import { ApiError, complete, models } from "./api.js";
import { asSent, contentOf, create, imagesOf, openCalls, sentMessages, textOf, titleOf } from "./conversation.js";
import { $, announce, copyBy, grow, onEnter } from "./dom.js";
import { attachedImages, clearAttached, startImages } from "./images.js";
import { showList } from "./list.js";
import { AnswerView, copyAction, viewOf } from "./message.js";
import { closeOverlay, startPanels } from "./panels.js";
import { askResults } from "./results.js";
import { checkSettings, offerThinking, requestFields, showSetting, startSettings, systemMessages } from "./settings.js";
import * as store from "./store.js";

let conversation = create();
let views = [];      // of its messages
let running = null;  // AbortController of the answer that comes
let cards = [];      // what /v1/models says
let follows = true;  // whether the end of the messages stays in view

const card = () => cards.find(({ id }) => id === $("model").value);

// -- what is shown ------------------------------------------------------------------------------------------

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function follow() {
  if (follows) $("messages").scrollTop = $("messages").scrollHeight;
}

function toEnd() {
  follows = true;
  $("to-end").hidden = true;
  follow();
}

function refresh() {
  const { messages } = conversation;
  const sent = new Set(sentMessages(messages));
  views.forEach((view, i) => view.refresh(running ? [] : actions(messages[i], i), !sent.has(messages[i])));
  $("messages").setAttribute("aria-busy", String(Boolean(running)));
  $("send").textContent = running ? "Stop" : "Send";
  $("send").classList.toggle("stop", Boolean(running));
  showContext();
  follow();
}

function actions(message, i) {
  const isLast = i === conversation.messages.length - 1;
  const { finish, stopped, error } = message.info ?? {};
  if (message.role === "user" || message.role === "tool") {
    return [
      ...(message.role === "user" ? [copyAction(message), ["Edit", () => edit(i)]] : []),
      ...(isLast ? [["Try again", () => answer()]] : []),
    ];
  }
  const isCut = message.content && (finish === "length" || stopped || error);
  return [
    ...(message.content ? [copyAction(message)] : []),
    ...(isLast ? [["Regenerate", () => regenerate()]] : []),
    ...(isLast && isCut ? [["Continue", () => answer(message)]] : []),
  ];
}

function showContext() {
  const most = card()?.max_model_len;
  const used = conversation.messages.findLast((message) => message.info?.usage)?.info.usage.total_tokens;
  $("context").hidden = !used || !most;
  if ($("context").hidden) return;
  const [meter, text] = $("context").children;
  meter.max = most;
  meter.value = used;
  text.textContent = `${used.toLocaleString("en")} of ${most.toLocaleString("en")} tokens`;
}

function show(shown) {
  stop();
  conversation = shown;
  $("messages").replaceChildren();
  views = conversation.messages.map((message) => viewOf($("messages"), message));
  askForResults();
  showConversations();
  refresh();
  toEnd();
}

function askForResults() {
  const at = conversation.messages.findLastIndex((message) => message.role !== "tool");
  if (at < 0 || !openCalls(conversation.messages).length) return;
  askResults(views[at], conversation.messages, (results) => {
    for (const result of results) add(result);
    answer();
  });
}

function add(message) {
  conversation.messages.push(message);
  views.push(viewOf($("messages"), message));
}

function cut(length) {
  conversation.messages.length = length;
  for (const view of views.splice(length)) view.box.remove();
}

// -- the list of conversations ------------------------------------------------------------------------------

const listActs = {
  open: (chosen) => { closeOverlay(); location.hash = chosen.id; },
  rename: async (chosen, title) => { await keep(Object.assign(chosen, { title })); },
  remove: async (chosen) => {
    if (!confirm("Delete this conversation?")) return;
    if (chosen === conversation) startNew();
    await store.remove(chosen.id).catch(() => {});
    showConversations();
  },
};

function showConversations() {
  showList(conversation.id, listActs);
  document.title = `${titleOf(conversation)} · lmdeploy_jax`;
}

async function keep(kept) {
  try {
    await store.save(kept);
  } catch (error) {
    notify(`This browser does not keep the conversation: ${error?.message ?? error}.`);
  }
  showConversations();
}

function startNew() {
  history.pushState(null, "", location.pathname + location.search);
  show(create());
  clearAttached();
  focusInput();
}

// -- asking -------------------------------------------------------------------------------------------------

function stop() {
  running?.abort();
  running = null;
}

function focusInput() {
  if (matchMedia("(pointer: fine)").matches) $("input").focus();  // elsewhere a keyboard would cover the page
}

function send() {
  const text = $("input").value.trim(), images = attachedImages();
  if (running || !(text || images.length) || !checkSettings()) return;
  $("input").value = "";
  store.saveDraft("");
  grow($("input"));
  clearAttached();
  $("messages").querySelector(".results")?.remove();
  add({ role: "user", content: contentOf(text, images) });
  answer();
}

function edit(i) {
  views[i].edit((text) => {
    if (!checkSettings()) return;
    const { content } = conversation.messages[i];
    cut(i);
    add({ role: "user", content: contentOf(text, imagesOf(content)) });
    answer();
  });
}

function regenerate() {
  if (!checkSettings()) return;
  cut(conversation.messages.length - 1);
  answer();
}

// Ask for an answer to the conversation; `begun`: an answer that goes on, the last message until now.
async function answer(begun) {
  if (!checkSettings()) return;
  const asked = conversation, run = (running = new AbortController());
  const body = { ...requestFields(), messages: [...systemMessages(), ...sentMessages(asked.messages).map(asSent)] };
  const coming = new Answer(body.model, begun);
  const view = begun ? views.pop() : new AnswerView($("messages"), coming.message);
  if (begun) asked.messages.pop();
  delete asked.messages.at(-1)?.info;
  begin(asked);
  const update = oncePerFrame(() => running === run && view.update(coming, follow));
  const clock = setInterval(update, 1000);
  update();
  let failure = null;
  try {
    for await (const event of complete(body, run.signal)) {
      coming.take(event);
      update();
    }
  } catch (error) {
    failure = error;
  }
  clearInterval(clock);
  if (failure?.status === 401) showSetting("key");
  coming.end(failure);
  await end(asked, coming, view, run);
}

// Pieces may come faster than a screen can show them.
function oncePerFrame(act) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => { isDue = false; act(); });
  };
}

function begin(asked) {
  notify("");
  asked.updated = Date.now();
  keep(asked);
  if (asked === conversation && location.hash !== `#${asked.id}`) history.replaceState(null, "", `#${asked.id}`);
  refresh();
  toEnd();
  announce("The model is answering");
  focusInput();
}

// The answer joins the conversation that it was asked for, whichever is shown now.
async function end(asked, coming, view, run) {
  const { message } = coming;
  if (coming.isEmpty && asked.messages.length) {
    view.box.remove();
    const { error, stopped } = message.info;
    asked.messages.at(-1).info = { stopped, error: error ?? (stopped ? undefined : "The model's answer is empty.") };
  } else {
    asked.messages.push(message);
    if (asked === conversation) views.push(view);
  }
  asked.updated = Date.now();
  if (running === run) running = null;
  if (asked === conversation && view.box.isConnected !== coming.isEmpty) await showEnd(view, message);
  else if (asked === conversation && !running) show(asked);  // it was left, and opened again before the answer had ended
  if (store.find(asked.id)) await keep(asked);  // it may have been deleted meanwhile
}

async function showEnd(view, message) {
  await view.finish(message);
  askForResults();
  refresh();
  announce(message.info.error ?? (textOf(message.content) || "The answer is complete"));
}

// -- the server ---------------------------------------------------------------------------------------------

// Whether the server asks for a key. It is told, and the focus stays: a message may be being written.
async function listModels() {
  let refusal = null;
  try {
    cards = await models();
    notify("");
  } catch (error) {
    cards = [];
    refusal = error;
  }
  const asksForKey = refusal instanceof ApiError && refusal.status === 401;
  if (refusal) notify(asksForKey ? "This server asks for an API key: give it in the settings." : refusal.message);
  const chosen = $("model").value;
  $("model").replaceChildren(...cards.map(({ id }) => new Option(id)));
  if (cards.some(({ id }) => id === chosen)) $("model").value = chosen;
  showModel();
  return asksForKey;
}

const takesImages = () => card()?.input_modalities.includes("image") ?? false;

function showModel() {
  $("attach").hidden = !takesImages();
  offerThinking(card());
  showContext();
}

// -- start --------------------------------------------------------------------------------------------------

function startComposer() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  });
  onEnter($("input"), send);
  $("input").addEventListener("input", () => { grow($("input")); store.saveDraft($("input").value); });
  $("input").value = store.loadDraft();
  $("new").addEventListener("click", startNew);
  focusInput();
}

function startMessages() {
  const box = $("messages");
  box.addEventListener("scroll", () => {
    follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    $("to-end").hidden = follows;
  });
  new ResizeObserver(follow).observe(box);  // a panel that opens makes its lines longer or shorter
  $("to-end").addEventListener("click", toEnd);
  box.addEventListener("click", ({ target }) => {
    if (target.matches(".copy")) copyBy(target, target.closest(".code").querySelector("code").textContent);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !closeOverlay()) running?.abort();
  if (event.key.toUpperCase() === "O" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    startNew();
  }
});

async function showChosen() {
  await store.load().catch(() => {});
  show(store.find(location.hash.slice(1)) ?? create());
}

function showOthersChanges() {
  const newer = store.find(conversation.id);
  if (newer && newer !== conversation && !running) show(newer);
  else showConversations();
}

startPanels();
startSettings((name) => name === "key" && listModels());
startImages(takesImages);
startComposer();
startMessages();
$("model").addEventListener("change", showModel);
$("search").addEventListener("input", showConversations);
addEventListener("hashchange", showChosen);
store.watch(showOthersChanges);
const [asksForKey] = await Promise.all([listModels(), showChosen()]);
if (asksForKey) showSetting("key");
document.body.dataset.ready = "";
