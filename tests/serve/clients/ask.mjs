// As ask.py, for the clients of npm: `node ask.mjs CLIENT URL`.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import Anthropic from "@anthropic-ai/sdk";
import { generateText, streamText } from "ai";
import { Ollama } from "ollama";
import OpenAI from "openai";

const MODEL = "pocket";
const QUESTION = "What is 3 + 4?";
const MESSAGES = [{ role: "user", content: QUESTION }];
const LEFT = 0.01;

const tell = (part, told = {}) => console.log(JSON.stringify([part, told]));

async function openai_js(url) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const told = ({ content, reasoning_content }, usage) => ({
    answer: content,
    thinking: reasoning_content,
    prompt_tokens: usage.prompt_tokens,
    output_tokens: usage.completion_tokens,
  });
  const asked = { model: MODEL, messages: MESSAGES };
  const done = await client.chat.completions.create({ ...asked, temperature: 0 });
  tell("whole", told(done.choices[0].message, done.usage));
  const message = { content: "", reasoning_content: "" };
  let usage;
  const streamed = { ...asked, temperature: 0, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create(streamed)) {
    usage = chunk.usage ?? usage;
    for (const name of ["content", "reasoning_content"]) message[name] += chunk.choices[0]?.delta[name] ?? "";
  }
  tell("stream", told(message, usage));
  const stream = await client.chat.completions.create({ ...asked, temperature: LEFT, stream: true });
  for await (const chunk of stream) break;
}

async function anthropic_js(url) {
  const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const told = ({ content, usage }) => ({
    answer: content.find((block) => block.type === "text").text,
    thinking: content.find((block) => block.type === "thinking").thinking,
    prompt_tokens: usage.input_tokens + usage.cache_read_input_tokens,
    output_tokens: usage.output_tokens,
  });
  const thinking = { type: "enabled", budget_tokens: 200 };
  const asked = { model: MODEL, max_tokens: 300, messages: MESSAGES, thinking };
  tell("whole", told(await client.messages.create({ ...asked, temperature: 0 })));
  tell("stream", told(await client.messages.stream({ ...asked, temperature: 0 }).finalMessage()));
  for await (const event of client.messages.stream({ ...asked, temperature: LEFT })) break;
}

async function ollama_js(url) {
  const client = new Ollama({ host: url });
  const told = ({ content, thinking }, last) => ({
    answer: content,
    thinking,
    prompt_tokens: last.prompt_eval_count,
    output_tokens: last.eval_count,
  });
  const asked = { model: MODEL, messages: MESSAGES, options: { temperature: 0 }, think: true };
  const done = await client.chat(asked);
  tell("whole", told(done.message, done));
  const message = { content: "", thinking: "" };
  let last;
  for await (last of await client.chat({ ...asked, stream: true })) {
    for (const name of ["content", "thinking"]) message[name] += last.message[name] ?? "";
  }
  tell("stream", told(message, last));
  const stream = await client.chat({ ...asked, options: { temperature: LEFT }, stream: true });
  for await (const line of stream) {
    stream.abort();
    break;
  }
}

async function ai_sdk(url) {
  const model = createOpenAICompatible({ name: "qwq", baseURL: `${url}/v1`, includeUsage: true })(MODEL);
  const told = (answer, thinking, usage) => ({
    answer,
    thinking,
    prompt_tokens: usage.inputTokens,
    output_tokens: usage.outputTokens,
  });
  const done = await generateText({ model, prompt: QUESTION, temperature: 0 });
  tell("whole", told(done.text, done.reasoningText, done.usage));
  const stream = streamText({ model, prompt: QUESTION, temperature: 0 });
  let answer = "";
  for await (const text of stream.textStream) answer += text;
  tell("stream", told(answer, await stream.reasoningText, await stream.usage));
  const abort = new AbortController();
  const long = streamText({ model, prompt: QUESTION, temperature: LEFT, abortSignal: abort.signal });
  for await (const part of long.fullStream) if (part.type === "reasoning-delta") abort.abort();
}

const [name, url] = process.argv.slice(2);
await { openai_js, anthropic_js, ollama_js, ai_sdk }[name](url);
tell("left");
process.stdin.resume();
