"""The attribute names of spans. They are in one module because the conventions behind them still change.

`messaging.*` and `error.type` are OpenTelemetry semantic conventions. `gen_ai.*` are conventions of its generative AI
repository (`gen_ai.client.inference`, in development). Attributes that neither has are under `headrace.`.
"""

from __future__ import annotations

from typing import Final

Value = str | bool | int | float | list[str] | None
"""What a span's attribute can hold; None leaves the attribute out."""

ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_DESTINATION_TEMPLATE: Final = "messaging.destination.template"
MESSAGING_DESTINATION_TEMPORARY: Final = "messaging.destination.temporary"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"

GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_EMBEDDINGS_DIMENSION_COUNT: Final = "gen_ai.embeddings.dimension.count"
GEN_AI_OUTPUT_TYPE: Final = "gen_ai.output.type"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_ENCODING_FORMATS: Final = "gen_ai.request.encoding_formats"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_TOP_K: Final = "gen_ai.request.top_k"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
GEN_AI_REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
GEN_AI_REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"

HEADRACE: Final = "headrace."
HEADRACE_PRIORITY: Final = "headrace.priority"
HEADRACE_TASK: Final = "headrace.task"
HEADRACE_ATTEMPT: Final = "headrace.attempt"
HEADRACE_WORKER: Final = "headrace.worker"
HEADRACE_DELIVERIES: Final = "headrace.deliveries"
HEADRACE_REASON: Final = "headrace.reason"
HEADRACE_OUTCOME: Final = "headrace.outcome"
HEADRACE_OUTCOME_REASON: Final = "headrace.outcome.reason"
HEADRACE_QUEUE_WAIT_MS: Final = "headrace.queue_wait_ms"
HEADRACE_TRIAGE_TASK: Final = "headrace.triage.task"
HEADRACE_TRIAGE_MOVE: Final = "headrace.triage.move"
HEADRACE_TRIAGE_REASON: Final = "headrace.triage.reason"
HEADRACE_MLX_SATURATION: Final = "headrace.mlx.saturation"
HEADRACE_MLX_PREDICTED_WAIT_MS: Final = "headrace.mlx.predicted_wait_ms"
HEADRACE_OLLAMA_PREDICTED_MS: Final = "headrace.ollama.predicted_ms"
