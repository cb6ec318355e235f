// What the scripts of the JavaScript clients share; python/cell.py describes it.

const {HEADRACE_URL, HEADRACE_SLOW_URL, HEADRACE_CHECKS = ''} = process.env
export const URL = HEADRACE_URL
export const SLOW = HEADRACE_SLOW_URL
export const OPENAI = `${URL}/v1`
export const SLOW_OPENAI = `${SLOW}/v1`
export const HIGH = {'X-Priority': 'high'}
export const KEY = {'Idempotency-Key': `retry-${process.pid}`}

export const QUESTION = 'What is the capital of France?'
export const ASK = [{role: 'user', content: QUESTION}]
export const WEATHER = 'What is the weather in Paris?'
export const ASK_WEATHER = [{role: 'user', content: WEATHER}]
export const PLACE = {type: 'object', properties: {city: {type: 'string'}}, required: ['city']}
export const FUNCTION = {name: 'get_weather', description: 'The weather in a city.', parameters: PLACE}
export const TOOL = {type: 'function', function: FUNCTION}
export const CAPITAL = {
  type: 'object',
  properties: {capital: {enum: ['Paris', 'Rome']}, rivers: {type: 'integer', minimum: 1, maximum: 9}},
  required: ['capital', 'rivers'],
  additionalProperties: false,
}
export const UNKNOWN = 'no-such-model'
export const EMBEDDER = 'feature-hashing'
const WAIT_MS = 30_000

const checks = new Map()

export function check(name, run) {
  checks.set(name, run)
}

export function lacks(name, reason) {
  checks.set(name, reason)
}

export async function run() {
  const only = HEADRACE_CHECKS.split(' ').filter(Boolean)
  for (const [name, run] of checks) {
    if (only.length > 0 && !only.includes(name)) continue
    let found = {result: 'none', note: run}
    if (typeof run === 'function') {
      try {
        found = {result: 'yes', note: await run()}
        if (typeof found.note !== 'string') found.note = ''
      } catch (error) {
        console.error(error)
        found = {result: 'no', note: `${error.name}: ${error.message}`.slice(0, 500)}
      }
    }
    console.log(JSON.stringify({check: name, ...found}))
  }
}

export function assert(fact, ...what) {
  if (!fact) throw new Error(`not true: ${JSON.stringify(what)}`)
}

async function counts(base) {
  const stats = await (await fetch(`${base}/queue/stats`)).json()
  const sum = state => ['high', 'medium', 'low'].reduce((total, lane) => total + stats[lane][state], 0)
  const states = ['queued', 'running', 'done', 'failed', 'cancelled']
  return {...Object.fromEntries(states.map(state => [state, sum(state)])), high: stats.high.done}
}

async function until(fact, what) {
  const giveUpAt = Date.now() + WAIT_MS
  while (!(await fact())) {
    assert(Date.now() < giveUpAt, `not within ${WAIT_MS} ms: ${what}`)
    await new Promise(resolve => setTimeout(resolve, 50))
  }
}

async function counted(base, state, call) {
  const before = await counts(base)
  await call()
  await until(async () => (await counts(base))[state] > before[state], `a request is ${state}`)
  await until(async () => ((now) => now.queued + now.running === 0)(await counts(base)), 'no request is left')
  const after = await counts(base)
  assert(after[state] === before[state] + 1, state, before, after)
  assert(after.failed === before.failed, 'a request failed')
  return [before, after]
}

export const cancelled = call => counted(SLOW, 'cancelled', call)

export async function answeredOnce(call) {
  const [before, after] = await counted(SLOW, 'done', call)
  assert(after.cancelled === before.cancelled, 'the request was cancelled')
}

export const urgent = call => counted(URL, 'high', call)

export async function raises(call, ...words) {
  let raised
  try {
    await call()
  } catch (error) {
    raised = error
  }
  assert(raised !== undefined, 'no error')
  const text = `${raised.name} ${raised.message} ${raised.lastError?.message ?? ''}`
  assert(words.every(word => text.includes(word)), text, words)
  return raised
}

export function says(text, word = 'Paris') {
  assert((text ?? '').includes(word), text)
}

export function isWeatherCall(name, input) {
  const decoded = typeof input === 'string' ? JSON.parse(input) : input
  assert(name === 'get_weather' && JSON.stringify(decoded) === '{"city":"Paris"}', name, decoded)
}

export function isCapital(answer) {
  const decoded = typeof answer === 'string' ? JSON.parse(answer) : answer
  assert(['Paris', 'Rome'].includes(decoded.capital) && decoded.rivers >= 1 && decoded.rivers <= 9, decoded)
}
