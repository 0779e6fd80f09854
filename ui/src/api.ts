/** Talking to the server this page came from. Keys are kept in these variables only, and are gone with the page. */

let key: string | null = null;
let adminKey: string | null = null;

export function setKey(value: string): void {
  key = value;
}

export function setAdminKey(value: string | null): void {
  adminKey = value;
}

/** The server wants a key, or another one. */
export class KeyNeeded extends Error {}

function headers(): Record<string, string> {
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

async function check(response: Response): Promise<Response> {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    const body = (await response.json()) as { error?: { message?: string } };
    message = body.error?.message ?? message;
  } catch {
    // not JSON: a proxy's page
  }
  if (response.status === 401) throw new KeyNeeded(message);
  throw new Error(message);
}

export async function getJson<T>(path: string): Promise<T> {
  return (await (await check(await fetch(path, { headers: headers() }))).json()) as T;
}

/** One of /v1/variants, with the administrator's key. */
export async function adminCall<T>(method: string, path: string, body?: unknown): Promise<T> {
  const request: RequestInit = { method, headers: { Authorization: `Bearer ${adminKey ?? ""}` } };
  if (body !== undefined) {
    request.headers = { ...request.headers, "Content-Type": "application/json" };
    request.body = JSON.stringify(body);
  }
  return (await (await check(await fetch(`/v1/variants${path}`, request))).json()) as T;
}

export interface ServerEvent {
  name: string;
  data: string;
}

/** The events of a body of text/event-stream as they arrive. */
export async function* parseEvents(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<ServerEvent> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of chunks) {
    rest += decoder.decode(chunk, { stream: true });
    const frames = rest.split("\n\n");
    rest = frames.pop() ?? "";
    for (const frame of frames) {
      const event = { name: "message", data: "" };
      for (const line of frame.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      if (event.data !== "") yield event;
    }
  }
}

async function* read(body: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array> {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

/** Server-sent events by fetch: an EventSource could not carry the key. */
export async function* events(path: string, signal: AbortSignal, body?: unknown): AsyncGenerator<ServerEvent> {
  const request: RequestInit = { headers: headers(), signal };
  if (body !== undefined) {
    request.method = "POST";
    request.headers = { ...headers(), "Content-Type": "application/json" };
    request.body = JSON.stringify(body);
  }
  const response = await check(await fetch(path, request));
  if (response.body === null) throw new Error("the answer has no body");
  yield* parseEvents(read(response.body));
}
