// openai-node: every status its class, streams, tools, the Responses API.
import assert from "node:assert/strict";
import OpenAI from "openai";

const { POLYMOE_URL, POLYMOE_LOADING_URL, POLYMOE_KEY, POLYMOE_SPENT_KEY } = process.env;
const connect = (url = POLYMOE_URL, apiKey = POLYMOE_KEY) => new OpenAI({ baseURL: url + "/v1", apiKey, maxRetries: 0 });
const client = connect();
const messages = [{ role: "user", content: "the fox" }];
const ask = { model: "base", messages, temperature: 0, max_tokens: 16 };

const whole = await client.chat.completions.create(ask);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

const parameters = {
  type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const forced = await client.chat.completions.create({
  ...ask, temperature: 1, seed: 1, max_tokens: 600, tools, tool_choice: "required", parallel_tool_calls: false,
});
assert.ok(["Paris", "Rome"].includes(JSON.parse(forced.choices[0].message.tool_calls[0].function.arguments).city));

const response = await client.responses.create({ model: "base", input: "the fox", temperature: 0, max_output_tokens: 16 });
let streamed = "";
const stream = await client.responses.create({
  model: "base", input: "the fox", temperature: 0, max_output_tokens: 16, stream: true,
});
for await (const event of stream) {
  if (event.type === "response.output_text.delta") streamed += event.delta;
}
assert.equal(streamed, response.output_text);

const bad = { ...ask, temperature: -1 };
for (const [kind, act] of [
  [OpenAI.BadRequestError, () => client.chat.completions.create(bad)],
  [OpenAI.AuthenticationError, () => connect(POLYMOE_URL, "wrong").chat.completions.create(ask)],
  [OpenAI.NotFoundError, () => client.chat.completions.create({ ...ask, model: "none" })],
  [OpenAI.RateLimitError, () => connect(POLYMOE_URL, POLYMOE_SPENT_KEY).chat.completions.create(ask)],
  [OpenAI.InternalServerError, () => connect(POLYMOE_LOADING_URL).chat.completions.create(ask)],
]) {
  await assert.rejects(act, (error) => error.constructor === kind && Boolean(error.requestID));
}
