// Anthropic's JavaScript client.

import Anthropic from '@anthropic-ai/sdk'
import {
  ASK, ASK_WEATHER, CAPITAL, HIGH, KEY, PLACE, SLOW, UNKNOWN, URL,
  answeredOnce, assert, cancelled, check, isCapital, isWeatherCall, lacks, raises, run, says, urgent,
} from './cell.mjs'

const client = new Anthropic({baseURL: URL, apiKey: 'unused'})
const slow = new Anthropic({baseURL: SLOW, apiKey: 'unused'})
const USUAL = {model: 'auto', max_tokens: 200}
const tools = [{name: 'get_weather', description: 'The weather in a city.', input_schema: PLACE}]

check('chat', async () => says((await client.messages.create({...USUAL, messages: ASK})).content[0].text))

check('stream', async () => says(await client.messages.stream({...USUAL, messages: ASK}).finalText()))

check('tools', async () => {
  const answer = await client.messages.create({...USUAL, messages: ASK_WEATHER, tools})
  const call = answer.content.at(-1)
  assert(answer.stop_reason === 'tool_use')
  isWeatherCall(call.name, call.input)
  const result = {type: 'tool_result', tool_use_id: call.id, content: '{"condition": "sunny", "celsius": 21}'}
  const history = [{role: 'assistant', content: answer.content}, {role: 'user', content: [result]}]
  const messages = [...ASK_WEATHER, ...history]
  says((await client.messages.create({...USUAL, messages, tools})).content[0].text)
})

check('form', async () => {
  const output_config = {format: {type: 'json_schema', schema: CAPITAL}}
  isCapital((await client.messages.create({...USUAL, messages: ASK, output_config})).content[0].text)
})

lacks('embeddings', "Anthropic's API has none")

check('errors', async () => {
  const error = await raises(() => client.messages.create({...USUAL, model: UNKNOWN, messages: ASK}), UNKNOWN)
  assert(error instanceof Anthropic.NotFoundError)
})

check('cancel', () => cancelled(async () => {
  for await (const event of await slow.messages.create({...USUAL, messages: ASK, stream: true})) {
    if (event.type === 'content_block_delta') break
  }
}))

check('retry', () => answeredOnce(async () => {
  const hasty = {timeout: 1000, maxRetries: 9, headers: KEY}
  assert((await slow.messages.create({...USUAL, messages: ASK}, hasty)).content[0].text)
}))

check('priority', () => urgent(() => client.messages.create({...USUAL, messages: ASK}, {headers: HIGH})))

await run()
