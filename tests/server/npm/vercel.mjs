// Vercel's AI SDK over each of its providers. The server's address is the argument; what was seen is printed as JSON.
import { embed, generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } from "ai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

globalThis.AI_SDK_LOG_WARNINGS = false;
const options = { baseURL: `${process.argv[2]}/v1`, apiKey: "none" };
const compatible = createOpenAICompatible({ ...options, name: "local", supportsStructuredOutputs: true });
const openai = createOpenAI(options);
const models = {
  compatible: compatible("tiny-chat"),
  chat: openai.chat("tiny-chat"),
  responses: openai.responses("tiny-chat"),
  messages: createAnthropic(options)("tiny-chat"),
};
const numbers = { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } };
const add = tool({ description: "Add two numbers.", inputSchema: jsonSchema(numbers), execute: ({ a, b }) => a + b });
const schema = jsonSchema({ type: "object", properties: { x: { type: "integer" } }, required: ["x"], additionalProperties: false });
const prompt = "What is 12 + 30?";
const seen = { vector: (await embed({ model: compatible.textEmbeddingModel("tiny-chat"), value: "a" })).embedding.length > 0 };

for (const [name, model] of Object.entries(models)) {
  const looped = { model, prompt, tools: { add }, stopWhen: stepCountIs(3) };
  let streamed = "";
  for await (const piece of streamText({ model, prompt }).textStream) streamed += piece;
  const objects = streamObject({ model, prompt, schema });
  for await (const _ of objects.partialObjectStream);
  seen[name] = {
    whole: (await generateText({ model, prompt })).text,
    streamed,
    tools: (await generateText(looped)).text,
    streamedTools: await streamText(looped).text,
    object: (await generateObject({ model, prompt, schema })).object,
    streamedObject: await objects.object,
  };
}
console.log(JSON.stringify(seen));
