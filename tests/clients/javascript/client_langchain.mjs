// LangChain.js, with its model of OpenAI's API.

import {tool} from '@langchain/core/tools'
import {ChatOpenAI, OpenAIEmbeddings} from '@langchain/openai'
import {z} from 'zod'
import {
  ASK_WEATHER, EMBEDDER, HIGH, KEY, OPENAI, QUESTION, SLOW_OPENAI, UNKNOWN,
  answeredOnce, assert, cancelled, check, isWeatherCall, raises, run, says, urgent,
} from './cell.mjs'

const made = (options = {}, baseURL = OPENAI, defaultHeaders = {}) =>
  new ChatOpenAI({model: 'auto', apiKey: 'unused', configuration: {baseURL, defaultHeaders}, ...options})
const Capital = z.object({capital: z.enum(['Paris', 'Rome']), rivers: z.number().int().min(1).max(9)})

check('chat', async () => says((await made().invoke(QUESTION)).text))

check('stream', async () => {
  let text = ''
  for await (const part of await made().stream(QUESTION)) text += part.text
  says(text)
})

check('tools', async () => {
  const description = {name: 'get_weather', description: 'The weather.', schema: z.object({city: z.string()})}
  const bound = made().bindTools([tool(({city}) => `sunny in ${city}`, description)])
  const [call] = (await bound.invoke(ASK_WEATHER)).tool_calls
  isWeatherCall(call.name, call.args)
})

check('form', async () => {
  for (const method of ['jsonSchema', 'functionCalling']) {
    assert((await made().withStructuredOutput(Capital, {method}).invoke(QUESTION)).capital, method)
  }
})

check('responses', async () => says((await made({useResponsesApi: true}).invoke(QUESTION)).text))

check('embeddings', async () => {
  const embeddings = new OpenAIEmbeddings({model: EMBEDDER, apiKey: 'unused', configuration: {baseURL: OPENAI}})
  assert((await embeddings.embedDocuments(['a cat', 'a dog'])).length === 2)
})

check('errors', () => raises(() => made({model: UNKNOWN}).invoke(QUESTION), UNKNOWN).then(() => ''))

check('cancel', () => cancelled(async () => {
  const controller = new AbortController()
  try {
    for await (const _ of await made({}, SLOW_OPENAI).stream(QUESTION, {signal: controller.signal})) controller.abort()
  } catch (error) {
    assert(/abort/i.test(`${error.name} ${error.message}`), error.message)
  }
}))

check('retry', () => answeredOnce(async () => {
  assert((await made({timeout: 1000, maxRetries: 9}, SLOW_OPENAI, KEY).invoke(QUESTION)).text)
}))

check('priority', () => urgent(() => made({}, OPENAI, HIGH).invoke(QUESTION)))

await run()
