// OpenAI's JavaScript client.

import OpenAI from 'openai'
import {zodResponseFormat} from 'openai/helpers/zod'
import {z} from 'zod'
import {
  ASK, ASK_WEATHER, EMBEDDER, FUNCTION, HIGH, KEY, OPENAI, QUESTION, SLOW_OPENAI, TOOL, UNKNOWN, WEATHER,
  answeredOnce, assert, cancelled, check, isWeatherCall, raises, run, says, urgent,
} from './cell.mjs'

const client = new OpenAI({baseURL: OPENAI, apiKey: 'unused'})
const slow = new OpenAI({baseURL: SLOW_OPENAI, apiKey: 'unused'})
const Capital = z.object({capital: z.enum(['Paris', 'Rome']), rivers: z.number().int().min(1).max(9)})

check('chat', async () => {
  const answer = await client.chat.completions.create({model: 'auto', messages: ASK})
  says(answer.choices[0].message.content)
})

check('stream', async () => {
  let text = ''
  const stream = await client.chat.completions.create({model: 'auto', messages: ASK, stream: true})
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? ''
  says(text)
})

check('tools', async () => {
  const answer = await client.chat.completions.create({model: 'auto', messages: ASK_WEATHER, tools: [TOOL]})
  const {message} = answer.choices[0]
  const [call] = message.tool_calls
  isWeatherCall(call.function.name, call.function.arguments)
  const result = {role: 'tool', tool_call_id: call.id, content: '{"condition": "sunny", "celsius": 21}'}
  const messages = [...ASK_WEATHER, message, result]
  says((await client.chat.completions.create({model: 'auto', messages, tools: [TOOL]})).choices[0].message.content)
})

check('form', async () => {
  const form = zodResponseFormat(Capital, 'capital')
  const answer = await client.chat.completions.parse({model: 'auto', messages: ASK, response_format: form})
  assert(answer.choices[0].message.parsed.capital)
})

check('responses', async () => {
  says((await client.responses.create({model: 'auto', input: QUESTION})).output_text)
  let text = ''
  for await (const event of await client.responses.create({model: 'auto', input: QUESTION, stream: true})) {
    if (event.type === 'response.output_text.delta') text += event.delta
  }
  says(text)
  const tools = [{type: 'function', ...FUNCTION}]
  const [call] = (await client.responses.create({model: 'auto', input: WEATHER, tools})).output
  isWeatherCall(call.name, call.arguments)
})

check('embeddings', async () => {
  assert((await client.embeddings.create({model: EMBEDDER, input: ['a cat', 'a dog']})).data.length === 2)
  const error = await raises(() => client.embeddings.create({model: 'headrace-demo', input: 'a cat'}), 'headrace-demo')
  assert(error instanceof OpenAI.NotFoundError)
})

check('errors', async () => {
  const wrong = await raises(() => client.chat.completions.create({model: UNKNOWN, messages: ASK}), UNKNOWN)
  assert(wrong instanceof OpenAI.NotFoundError)
  const cold = {model: 'auto', messages: ASK, temperature: -1}
  assert((await raises(() => client.chat.completions.create(cold), 'temperature')) instanceof OpenAI.BadRequestError)
})

check('cancel', () => cancelled(async () => {
  const stream = await slow.chat.completions.create({model: 'auto', messages: ASK, stream: true})
  for await (const _ of stream) break
}))

check('retry', () => answeredOnce(async () => {
  const hasty = {timeout: 1000, maxRetries: 9, headers: KEY}
  assert((await slow.chat.completions.create({model: 'auto', messages: ASK}, hasty)).choices[0].message.content)
}))

check('priority', () => urgent(() => client.chat.completions.create({model: 'auto', messages: ASK}, {headers: HIGH})))

await run()
