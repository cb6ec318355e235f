// Ollama's JavaScript client. It makes no retries of its own, so the script repeats the call.

import {Ollama} from 'ollama'
import {
  ASK, ASK_WEATHER, CAPITAL, EMBEDDER, HIGH, KEY, SLOW, TOOL, UNKNOWN, URL,
  answeredOnce, assert, cancelled, check, isCapital, isWeatherCall, raises, run, says, urgent,
} from './cell.mjs'

const client = new Ollama({host: URL})
const slow = new Ollama({host: SLOW})
const model = 'auto'

check('chat', async () => {
  says((await client.chat({model, messages: ASK})).message.content)
  assert((await client.list()).models.some(listed => listed.model === 'auto'))
  assert((await client.show({model})).capabilities.includes('tools'))
})

check('stream', async () => {
  let text = ''
  for await (const part of await client.chat({model, messages: ASK, stream: true})) text += part.message.content
  says(text)
})

check('tools', async () => {
  const {message} = await client.chat({model, messages: ASK_WEATHER, tools: [TOOL]})
  const [call] = message.tool_calls
  isWeatherCall(call.function.name, call.function.arguments)
  const result = {role: 'tool', tool_name: 'get_weather', content: '{"condition": "sunny", "celsius": 21}'}
  says((await client.chat({model, messages: [...ASK_WEATHER, message, result], tools: [TOOL]})).message.content)
})

check('form', async () => isCapital((await client.chat({model, messages: ASK, format: CAPITAL})).message.content))

check('embeddings', async () => {
  assert((await client.embed({model: EMBEDDER, input: ['a cat', 'a dog']})).embeddings.length === 2)
  await raises(() => client.embed({model: 'headrace-demo', input: 'a cat'}), 'ResponseError', 'headrace-demo')
})

check('errors', async () => {
  await raises(() => client.chat({model: UNKNOWN, messages: ASK}), 'ResponseError', UNKNOWN)
})

check('cancel', () => cancelled(async () => {
  const stream = await slow.chat({model, messages: ASK, stream: true})
  await raises(async () => {
    for await (const _ of stream) stream.abort()
  }, 'AbortError')
}))

check('retry', () => answeredOnce(async () => {
  for (let tries = 0; tries < 9; tries += 1) {
    const hasty = new Ollama({host: SLOW, headers: KEY})
    const timer = setTimeout(() => hasty.abort(), 1000)
    const part = {}
    try {
      for await (const {message} of await hasty.chat({model, messages: ASK, stream: true})) part.text = message.content
      assert(part.text !== undefined)
      return
    } catch (error) {
      assert(error.name === 'AbortError', error)
    } finally {
      clearTimeout(timer)
    }
  }
  throw new Error('no answer')
}))

check('priority', () => urgent(() => new Ollama({host: URL, headers: HIGH}).chat({model, messages: ASK})))

await run()
