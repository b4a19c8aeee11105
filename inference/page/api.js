// OpenAI's interface as this page uses it: one model, and texts that come in parts.

const KEY = "api-key";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const useKey = (key) => sessionStorage.setItem(KEY, key);

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server can't be reached. Look whether it still runs, then try again.", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(body?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

export async function servedModel() {
  return (await (await ask("v1/models")).json()).data[0];
}

// Yields {text, tokens, finish, usage, truncated}; a token is {bytes, logprob, top: [[text, logprob], ...]}.
export async function* generate(mode, body, signal) {
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const whole = { ...body, truncation: "auto", stream: true, stream_options: { include_usage: true } };
  const headers = { "content-type": "application/json" };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(whole), signal });
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Refused(chunk.error.message, 0);
    const choice = chunk.choices[0] ?? {};
    const text = choice.delta?.content ?? choice.text ?? "";
    const { usage, truncated } = chunk;
    yield { text, tokens: tokensOf(choice.logprobs), finish: choice.finish_reason, usage, truncated };
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new Refused("The connection ended before the text was complete.", 0);
    held += part.value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice("data: ".length));
    }
  }
}

function tokensOf(found) {
  if (!found) return [];
  if (found.content) {
    return found.content.map(({ bytes, logprob, top_logprobs: top }) =>
      ({ bytes, logprob, top: top.map((other) => [other.token, other.logprob]) }));
  }
  return found.tokens.map((token, place) =>
    ({ bytes: bytesOf(token), logprob: found.token_logprobs[place], top: Object.entries(found.top_logprobs[place]) }));
}

// Completions write a token that is no whole text as "bytes:\xe2\x80".
function bytesOf(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return [...new TextEncoder().encode(token)];
  return token.slice("bytes:\\x".length).split("\\x").map((byte) => parseInt(byte, 16));
}
