// OpenAI's client. The server's address is the argument; what was seen is printed as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const input = "What is 12 + 30?";
const asked = { model: "tiny-chat", messages: [{ role: "user", content: input }] };
const parameters = { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } };
const add = { name: "add", description: "Add two numbers.", parameters, parse: JSON.parse, function: ({ a, b }) => String(a + b) };
const tools = [{ type: "function", function: add }];
const schema = { type: "object", properties: { x: { type: "integer" } }, required: ["x"], additionalProperties: false };
const chat = client.chat.completions;

let streamed = "";
for await (const chunk of await chat.create({ ...asked, stream: true })) streamed += chunk.choices[0]?.delta.content ?? "";
const answer = await client.responses.create({ model: "tiny-chat", input, include: ["message.output_text.logprobs"] });
console.log(JSON.stringify({
  whole: (await chat.create(asked)).choices[0].message.content,
  streamed,
  helper: await chat.stream(asked).finalContent(),
  tools: await chat.runTools({ ...asked, tools }).finalContent(),
  streamedTools: await chat.runTools({ ...asked, tools, stream: true }).finalContent(),
  parsed: (await chat.parse({ ...asked, response_format: { type: "json_schema", json_schema: { name: "sum", schema } } })).choices[0].message.content,
  response: answer.output_text,
  tokens: answer.output[0].content[0].logprobs.map((entry) => entry.token).join(""),
  streamedResponse: (await client.responses.stream({ model: "tiny-chat", input }).finalResponse()).output_text,
  vectors: (await client.embeddings.create({ model: "tiny-chat", input: ["a", "b"] })).data.length,
  models: (await client.models.list()).data.map((model) => model.id),
}));
