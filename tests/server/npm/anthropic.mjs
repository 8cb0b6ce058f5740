// Anthropic's client. The server's address is the argument; what was seen is printed as JSON.
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asked = { model: "tiny-chat", max_tokens: 99, messages: [{ role: "user", content: "What is 12 + 30?" }] };
const numbers = { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } };
const add = betaTool({ name: "add", description: "Add two numbers.", inputSchema: numbers, run: ({ a, b }) => String(a + b) });
const schema = { type: "object", properties: { x: { type: "integer" } }, required: ["x"], additionalProperties: false };

console.log(JSON.stringify({
  whole: (await client.messages.create(asked)).content[0].text,
  streamed: await client.messages.stream(asked).finalText(),
  tools: (await client.beta.messages.toolRunner({ ...asked, tools: [add] })).content[0].text,
  form: (await client.messages.create({ ...asked, output_config: { format: { type: "json_schema", schema } } })).content[0].text,
  tokens: (await client.messages.countTokens({ model: "tiny-chat", messages: asked.messages })).input_tokens > 0,
  models: (await client.models.list()).data.map((model) => [model.id, model.type]),
}));
