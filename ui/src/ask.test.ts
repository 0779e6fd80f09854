import { expect, test } from "vitest";
import { isOpen, request, toShow } from "./admin";
import { parseEvents } from "./api";
import { body, EMPTY, python, type Settings, snippet, take } from "./ask";
import { differs, pieces } from "./diff";
import { at, bytesNow, planCommand } from "./dial";
import { bytes, seconds, short } from "./format";
import { History, KEPT, worst } from "./history";
import { matches, merge, MOST } from "./requests";
import type { Bundle, RequestRecord, Snapshot } from "./types";

const settings: Settings = {
  chat: true, system: "", prompt: "it's", temperature: "0", topP: "", maxTokens: "8", seed: "", schema: "", tools: "",
  alternatives: false,
};

test("empty fields are not sent", () => {
  expect(body(settings, "math")).toEqual({
    model: "math", messages: [{ role: "user", content: "it's" }], max_tokens: 8, temperature: 0,
  });
  expect(body({ ...settings, chat: false, alternatives: true, tools: "[1]" }, "m")).toEqual({
    model: "m", prompt: "it's", max_tokens: 8, temperature: 0, logprobs: 5,
  });
});

test("schema and tools are sent as JSON, or refused", () => {
  const sent = body({ ...settings, schema: '{"type": "object"}', tools: '[{"type": "function"}]' }, "m");
  expect(sent.response_format).toEqual({ type: "json_schema", json_schema: { name: "answer", schema: { type: "object" } } });
  expect(sent.tools).toEqual([{ type: "function" }]);
  expect(() => body({ ...settings, schema: "{" }, "m")).toThrow(/JSON schema/);
  expect(() => body({ ...settings, temperature: "hot" }, "m")).toThrow(/Temperature: hot/);
});

test("snippets survive quotes", () => {
  expect(snippet("curl", settings, "m", "http://h")).toContain(`"content":"it'\\''s"`);
  expect(snippet("Python", settings, "m", "http://h")).toContain(`"content": "it's"`);
  expect(python({ a: [true, null, 1] })).toBe('{\n    "a": [\n        True,\n        None,\n        1,\n    ],\n}');
});

test("chunks of both APIs add up", () => {
  let chat = take(EMPTY, { choices: [{ delta: { content: "" } }], usage: { completion_tokens: 0 } }, 0.1);
  expect(chat.firstToken).toBe(null);
  const logprobs = { content: [{ token: "a", logprob: -1, top_logprobs: [{ token: "b", logprob: -0.5 }] }] };
  chat = take(chat, { choices: [{ delta: { content: "a" }, logprobs }], usage: { completion_tokens: 1 } }, 0.2);
  chat = take(chat, { choices: [{ delta: {}, finish_reason: "stop" }] }, 0.3);
  expect(chat).toMatchObject({ text: "a", count: 1, firstToken: 0.2, finish: "stop" });
  expect(chat.tokens).toEqual([{ text: "a", logprob: -1, top: [["b", -0.5]] }]);
  const legacy = { tokens: ["x"], token_logprobs: [-2], top_logprobs: [{ y: -0.1 }] };
  expect(take(EMPTY, { choices: [{ text: "x", logprobs: legacy }] }, 1).tokens[0]?.top).toEqual([["y", -0.1]]);
  expect(take(chat, { error: { message: "no" } }, 1)).toMatchObject({ text: "a", error: "no", finish: "error" });
});

test("events may arrive in any pieces", async () => {
  const bytesOf = new TextEncoder().encode('event: a\ndata: {"x":"é"}\n\ndata: [DONE]\n\n');
  async function* cut() {
    for (const byte of bytesOf) {
      await Promise.resolve();
      yield new Uint8Array([byte]);
    }
  }
  const found = [];
  for await (const event of parseEvents(cut())) found.push(event);
  expect(found).toEqual([{ name: "a", data: '{"x":"é"}' }, { name: "message", data: "[DONE]" }]);
});

test("what differs is outside the longest common subsequence", () => {
  expect(pieces("a  b\n")).toEqual(["a", "  b", "\n"]);
  expect(differs(["a", "b", "c"], ["a", "x", "c", "d"])).toEqual([false, true, false, true]);
  expect(differs([], ["a"])).toEqual([true]);
});

test("the dial between its points", () => {
  const dial = [
    { expert_bytes: 100, kl: 0.01, top1: 0.9 },
    { expert_bytes: 200, kl: 0.0001, top1: 0.98 },
    { expert_bytes: 400, kl: 0, top1: 1 },
  ];
  expect(at(dial, 150).kl).toBeCloseTo(0.001, 6);
  expect(at(dial, 50).kl).toBeCloseTo(0.01, 6);
  expect(at(dial, 900)).toMatchObject({ kl: 0, top1: 1 });
});

test("the command for a budget", () => {
  const bundle = {
    name: "b", layers: ["0", "1"], num_experts: 5, expert_bytes: 10,
    variants: [{ name: "a", source: "org/a@v1" }, { name: "b", source: "/it's" }],
  } as unknown as Bundle;
  expect(planCommand(bundle, 55)).toBe("polymoe plan a=org/a@v1 b='/it'\\''s' --memory 0.55x --out bundles/b-0.55x");
  expect(planCommand({ ...bundle, dial_of: "all" }, 3.01 * 1024 ** 2)).toContain(" --memory 3.1MiB --out bundles/b-3.1MiB");
});

test("what the curve is about", () => {
  const resident_bytes = { resident_experts: 5, deltas: 2, nonexperts_own: 10, tables: 1 };
  expect(bytesNow({ dial_of: "experts", resident_bytes } as unknown as Bundle)).toBe(7);
  expect(bytesNow({ dial_of: "all", resident_bytes } as unknown as Bundle)).toBe(18);
});

test("numbers for people", () => {
  expect([bytes(12), bytes(1536), bytes(3 * 1024 ** 3)]).toEqual(["12 B", "1.5 KiB", "3.0 GiB"]);
  expect([seconds(null), seconds(0.0123), seconds(2)]).toEqual(["–", "12.3 ms", "2.00 s"]);
  expect([short(0), short(0.00001), short(12345), short(0.12345)]).toEqual(["0", "1.0e-5", "12345", "0.123"]);
});

test("the history does not grow", () => {
  const history = new History();
  for (let time = 0; time < 2 * KEPT; time++) history.add({ time } as Snapshot);
  expect(history.snapshots.length).toBe(KEPT);
  expect(history.latest?.time).toBe(2 * KEPT - 1);
  expect(worst([[1, 2, 3], null, [4, 5, 6]], 1, -1)).toBe(5);
  expect(worst([[1, 2, 3], null], 1, 1)).toBe(null);
});

test("requests are merged by number and filtered by words", () => {
  const record = (number: number, more: Partial<RequestRecord> = {}) =>
    ({ number, id: `r${String(number)}`, variant: "math", tenant: "", kind: "chat", finish: null, error: null, prompt: null, ...more }) as RequestRecord;
  const found = merge([record(1), record(2)], [record(2, { finish: "stop" }), record(3)]);
  expect(found.map((r) => [r.number, r.finish])).toEqual([[1, null], [2, "stop"], [3, null]]);
  expect(merge([], Array.from({ length: MOST + 5 }, (_, i) => record(i))).length).toBe(MOST);
  expect(matches(record(1, { error: "Too long" }), "MATH long")).toBe(true);
  expect(matches(record(1), "code")).toBe(false);
});

test("what the administrator asks for", () => {
  const wanted = { action: "add" as const, name: " math ", source: " v2 ", bits: "" };
  expect(request(wanted)).toEqual(["POST", "", { name: "math", source: "v2" }]);
  expect(request({ ...wanted, action: "replace", name: "a b", bits: "2" })).toEqual(["PUT", "/a%20b", { source: "v2", bits: 2 }]);
  expect(request({ ...wanted, action: "alias" })).toEqual(["POST", "/math/alias", { to: "v2" }]);
  expect(request({ ...wanted, action: "rollback" })).toEqual(["POST", "/math/rollback"]);
  expect(request({ ...wanted, action: "remove" })).toEqual(["DELETE", "/math"]);
  expect(request({ ...wanted, action: "unpin", name: "math@12345678" })).toEqual(["POST", "/math%4012345678/pin", { pinned: false }]);
  expect(request({ ...wanted, action: "replan" })).toEqual(["POST", "/-/replan", {}]);
});

test("changes that are done are not shown", () => {
  const change = { name: "a", kind: "add", stage: "", fraction: 0, error: null };
  const states = ["planning", "loading", "writing", "draining", "done", "failed"].map((state) => ({ ...change, state }));
  expect(states.filter(isOpen).map((c) => c.state)).toEqual(["planning", "loading", "writing", "draining"]);
  expect(toShow(states).map((c) => c.state)).toEqual(["planning", "loading", "writing", "draining", "failed"]);
});
