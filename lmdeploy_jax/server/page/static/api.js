// The server's routes. Addresses are relative, so that the page works behind a proxy's prefix.

let key = "";

export function useKey(given) {
  key = given;
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(`The server cannot be reached: ${error.message}.`, 0);
  }
  if (!response.ok) throw new ApiError(await explain(response), response.status);
  return response;
}

async function explain(response) {
  const text = await response.text();
  try { return JSON.parse(text).error.message; } catch { return `${response.status} ${text}`; }
}

export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

// An answer in Markdown as HTML, which may be trusted: see server/page/markdown.py.
export async function markdown(text) {
  return (await ask("markdown", { method: "POST", body: JSON.stringify({ text }) })).json();
}

// The events of a streamed answer.
export async function* complete(body, signal) {
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}
