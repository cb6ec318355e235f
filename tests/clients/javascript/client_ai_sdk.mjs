// The AI SDK, with its providers of OpenAI's API (responses by default, and chats), any compatible API, and Anthropic's.

import {createAnthropic} from '@ai-sdk/anthropic'
import {createOpenAI} from '@ai-sdk/openai'
import {createOpenAICompatible} from '@ai-sdk/openai-compatible'
import {Output, embedMany, generateText, stepCountIs, streamText, tool} from 'ai'
import {z} from 'zod'
import {
  EMBEDDER, HIGH, KEY, OPENAI, QUESTION, SLOW_OPENAI, UNKNOWN, WEATHER,
  answeredOnce, assert, cancelled, check, raises, run, says, urgent,
} from './cell.mjs'

const openai = createOpenAI({baseURL: OPENAI, apiKey: 'unused'})
const compatible = createOpenAICompatible({name: 'headrace', baseURL: OPENAI, supportsStructuredOutputs: true})
const anthropic = createAnthropic({baseURL: OPENAI, apiKey: 'unused'})
const slow = createOpenAICompatible({name: 'headrace', baseURL: SLOW_OPENAI})
const CHATS = [openai.chat('auto'), compatible('auto'), anthropic('auto')]
const Capital = z.object({capital: z.enum(['Paris', 'Rome']), rivers: z.number().int().min(1).max(9)})

const asked = model => generateText({model, prompt: QUESTION})

async function streamed(model) {
  let text = ''
  for await (const part of streamText({model, prompt: QUESTION}).textStream) text += part
  return text
}

async function called(model) {
  const calls = []
  const get_weather = tool({
    description: 'The weather in a city.',
    inputSchema: z.object({city: z.string()}),
    execute: async ({city}) => {
      calls.push(city)
      return {condition: 'sunny', celsius: 21}
    },
  })
  const {text} = await generateText({model, prompt: WEATHER, tools: {get_weather}, stopWhen: stepCountIs(3)})
  assert(calls.join() === 'Paris', calls)
  says(text)
}

async function formed(model) {
  const {output} = await generateText({model, prompt: QUESTION, output: Output.object({schema: Capital})})
  assert(output.capital)
}

check('chat', async () => {
  for (const model of CHATS) says((await asked(model)).text)
})

check('responses', async () => {
  const model = openai('auto')
  says((await asked(model)).text)
  says(await streamed(model))
  await called(model)
  await formed(model)
})

check('stream', async () => {
  for (const model of CHATS) says(await streamed(model))
})

check('tools', async () => {
  for (const model of CHATS) await called(model)
})

check('form', async () => {
  for (const model of [openai.chat('auto'), compatible('auto')]) await formed(model)
})

check('embeddings', async () => {
  for (const provider of [openai, compatible]) {
    const values = ['a cat', 'a dog']
    assert((await embedMany({model: provider.embeddingModel(EMBEDDER), values})).embeddings.length === 2)
  }
})

check('errors', async () => {
  await raises(() => asked(compatible(UNKNOWN)), UNKNOWN)
})

check('cancel', () => cancelled(async () => {
  const controller = new AbortController()
  const {textStream} = streamText({model: slow('auto'), prompt: QUESTION, abortSignal: controller.signal})
  for await (const _ of textStream) controller.abort()
}))

check('retry', () => answeredOnce(async () => {
  // It retries what the server refuses, and not its own time-out: the script repeats the call.
  for (let tries = 0; tries < 9; tries += 1) {
    const hasty = {abortSignal: AbortSignal.timeout(1000), headers: KEY}
    try {
      assert((await generateText({model: slow('auto'), prompt: QUESTION, ...hasty})).text)
      return
    } catch (error) {
      assert(['AbortError', 'TimeoutError'].includes(error.name), error.name)
    }
  }
  throw new Error('no answer')
}))

check('priority', () => urgent(() => generateText({model: compatible('auto'), prompt: QUESTION, headers: HIGH})))

await run()
