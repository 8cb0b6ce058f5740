// What the browser keeps: conversations in IndexedDB, settings in localStorage. Where it keeps nothing, as in
// some private windows, both last as long as the page.

const DATABASE = "lmdeploy_jax", CONVERSATIONS = "conversations", SETTINGS = "lmdeploy_jax.settings", DRAFT = "lmdeploy_jax.draft";
let database = null;
const kept = new Map();  // every conversation by its id

function open() {
  return (database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  }));
}

async function ask(mode, act) {
  const transaction = (await open()).transaction(CONVERSATIONS, mode);
  const request = act(transaction.objectStore(CONVERSATIONS));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

const tabs = globalThis.BroadcastChannel ? new BroadcastChannel(DATABASE) : null;

// changed: called when another tab has changed what is kept.
export function watch(changed) {
  tabs?.addEventListener("message", async ({ data }) => {
    if (data.removed) kept.delete(data.removed);
    else await load();
    changed();
  });
}

// Read what is kept, another tab's changes too. Raises where the browser keeps nothing.
export async function load() {
  for (const found of await ask("readonly", (store) => store.getAll())) {
    if (!(kept.get(found.id)?.saved >= found.saved)) kept.set(found.id, found);
  }
}

export const find = (id) => kept.get(id);
export const latestFirst = () => [...kept.values()].sort((a, b) => b.updated - a.updated);

export async function save(conversation) {
  conversation.saved = Date.now();
  kept.set(conversation.id, conversation);
  await ask("readwrite", (store) => store.put(conversation));
  tabs?.postMessage({ saved: conversation.id });
}

export async function remove(id) {
  kept.delete(id);
  await ask("readwrite", (store) => store.delete(id));
  tabs?.postMessage({ removed: id });
}

// The message that is being written lasts as long as the tab.
export function loadDraft() {
  try { return sessionStorage.getItem(DRAFT) ?? ""; } catch { return ""; }
}

export function saveDraft(text) {
  try { sessionStorage.setItem(DRAFT, text); } catch { /* it lasts as long as the page */ }
}

export function loadSettings() {
  try { return JSON.parse(localStorage.getItem(SETTINGS)) ?? {}; } catch { return {}; }
}

export function saveSettings(settings) {
  try { localStorage.setItem(SETTINGS, JSON.stringify(settings)); } catch { /* they last as long as the page */ }
}
