/** One question to one variant: the request's body, the stream of its answer, and the same as code. */

import { events } from "./api";

export interface Settings {
  chat: boolean;
  system: string;
  prompt: string;
  temperature: string;
  topP: string;
  maxTokens: string;
  seed: string;
  schema: string;
  tools: string;
  alternatives: boolean;
}

export interface Token {
  text: string;
  logprob: number;
  top: [text: string, logprob: number][];
}

export interface Answer {
  text: string;
  tokens: Token[]; // with log-probabilities only
  count: number;
  firstToken: number | null; // seconds
  duration: number | null; // seconds; null: it runs
  finish: string | null;
  error: string | null;
}

export const EMPTY: Answer = {
  text: "",
  tokens: [],
  count: 0,
  firstToken: null,
  duration: null,
  finish: null,
  error: null,
};

function number(text: string, name: string): number | undefined {
  if (text.trim() === "") return undefined;
  const value = Number(text);
  if (Number.isNaN(value)) throw new Error(`${name}: ${text} is not a number`);
  return value;
}

function json(text: string, name: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: ${String(error)}`);
  }
}

/** Raises an Error for what cannot be sent. Fields that are empty are left out. */
export function body(settings: Settings, model: string): Record<string, unknown> {
  const found: Record<string, unknown> = { model };
  if (settings.chat) {
    const messages = [{ role: "user", content: settings.prompt }];
    if (settings.system.trim() !== "") messages.unshift({ role: "system", content: settings.system });
    found.messages = messages;
  } else {
    found.prompt = settings.prompt;
  }
  const numbers: [string, number | undefined][] = [
    ["max_tokens", number(settings.maxTokens, "Tokens")],
    ["temperature", number(settings.temperature, "Temperature")],
    ["top_p", number(settings.topP, "Top p")],
    ["seed", number(settings.seed, "Seed")],
  ];
  for (const [name, value] of numbers) {
    if (value !== undefined) found[name] = value;
  }
  if (settings.schema.trim() !== "") {
    const schema = json(settings.schema, "JSON schema");
    found.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  if (settings.chat && settings.tools.trim() !== "") found.tools = json(settings.tools, "Tools");
  if (settings.alternatives) {
    if (settings.chat) {
      found.logprobs = true;
      found.top_logprobs = 5;
    } else found.logprobs = 5;
  }
  return found;
}

interface Chunk {
  error?: { message: string };
  usage?: { completion_tokens: number } | null;
  choices?: {
    text?: string;
    delta?: { content?: string | null; reasoning_content?: string | null; tool_calls?: unknown };
    finish_reason?: string | null;
    logprobs?: {
      content?: { token: string; logprob: number; top_logprobs: { token: string; logprob: number }[] }[] | null;
      tokens?: string[];
      token_logprobs?: (number | null)[];
      top_logprobs?: (Record<string, number> | null)[] | null;
    } | null;
  }[];
}

function tokensOf(logprobs: NonNullable<NonNullable<Chunk["choices"]>[number]["logprobs"]>): Token[] {
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      text: one.token,
      logprob: one.logprob,
      top: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return (logprobs.tokens ?? []).map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs?.[i] ?? 0,
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

/** Add one event of the stream. */
export function take(answer: Answer, chunk: Chunk, seconds: number): Answer {
  if (chunk.error) return { ...answer, error: chunk.error.message, finish: "error" };
  const choice = chunk.choices?.[0];
  const found = { ...answer, count: chunk.usage?.completion_tokens ?? answer.count };
  if (choice === undefined) return found;
  let text = choice.text ?? `${choice.delta?.reasoning_content ?? ""}${choice.delta?.content ?? ""}`;
  if (choice.delta?.tool_calls !== undefined && choice.delta.tool_calls !== null) {
    text += JSON.stringify(choice.delta.tool_calls);
  }
  if (choice.logprobs) found.tokens = [...answer.tokens, ...tokensOf(choice.logprobs)];
  found.text = answer.text + text;
  if (found.firstToken === null && (found.count > 0 || text !== "")) found.firstToken = seconds;
  found.finish = choice.finish_reason ?? answer.finish;
  return found;
}

/** Stream the answer of one variant; `show` is called with each state of it. */
export async function ask(
  settings: Settings,
  model: string,
  signal: AbortSignal,
  show: (answer: Answer) => void,
): Promise<void> {
  let answer = EMPTY;
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  try {
    const sent = {
      ...body(settings, model),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    const path = settings.chat ? "/v1/chat/completions" : "/v1/completions";
    for await (const event of events(path, signal, sent)) {
      if (event.data === "[DONE]") break;
      answer = take(answer, JSON.parse(event.data) as Chunk, since());
      show(answer);
    }
  } catch (error) {
    if (signal.aborted) answer = { ...answer, finish: "stopped" };
    else answer = { ...answer, error: error instanceof Error ? error.message : String(error), finish: "error" };
  }
  show({ ...answer, duration: since() });
}

export type Language = "curl" | "Python" | "JavaScript";

function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A JSON value as Python writes it. */
export function python(value: unknown, indent = 0): string {
  const inner = " ".repeat(indent + 4);
  const end = " ".repeat(indent);
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) {
    if (value.length === 0) return "[]";
    return `[\n${value.map((item) => inner + python(item, indent + 4)).join(",\n")},\n${end}]`;
  }
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, item]) => `${inner}${JSON.stringify(key)}: ${python(item, indent + 4)}`);
    return items.length === 0 ? "{}" : `{\n${items.join(",\n")},\n${end}}`;
  }
  return JSON.stringify(value);
}

/** Code that asks the same. Fields that OpenAI's client does not know go into `extra_body`. */
export function snippet(language: Language, settings: Settings, model: string, origin: string): string {
  const sent = body(settings, model);
  const path = settings.chat ? "chat/completions" : "completions";
  if (language === "curl") {
    return (
      `curl ${origin}/v1/${path} -H 'Content-Type: application/json' -H "Authorization: Bearer $POLYMOE_API_KEY" \\\n` +
      `  -d ${quoted(JSON.stringify(sent))}`
    );
  }
  const text = JSON.stringify(sent, null, 2);
  if (language === "JavaScript") {
    return (
      `import OpenAI from "openai";\n\n` +
      `const client = new OpenAI({ baseURL: "${origin}/v1", apiKey: process.env.POLYMOE_API_KEY ?? "none" });\n` +
      `const answer = await client.${path.replace("/", ".")}.create(${text});\n` +
      `console.log(answer.choices[0]${settings.chat ? ".message.content" : ".text"});\n`
    );
  }
  return (
    `import os\n\nfrom openai import OpenAI\n\n` +
    `client = OpenAI(base_url="${origin}/v1", api_key=os.environ.get("POLYMOE_API_KEY", "none"))\n` +
    `answer = client.${path.replace("/", ".")}.create(**${python(sent)})\n` +
    `print(answer.choices[0]${settings.chat ? ".message.content" : ".text"})\n`
  );
}
