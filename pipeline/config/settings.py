"""Every setting of headrace: its type, default and help in one declaration each.

The key `http_port` is the option `--http-port`, the environment variable `HEADRACE_HTTP_PORT` and the TOML key
`http_port`. `--help`, `docs/configuration.md` and the messages for invalid values are made from these declarations.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import field

from pipeline.config.declaring import Setting, declared
from pipeline.config.kinds import (
    ApiKey,
    Arguments,
    BlasLibrary,
    Bytes,
    BytesOrZero,
    Cost,
    Count,
    Engine,
    Folder,
    Host,
    HostNames,
    Lease,
    Lines,
    LogLevel,
    ModelName,
    ModelNames,
    ModelPairs,
    ModelPlace,
    Number,
    OllamaHost,
    Origins,
    Port,
    Rate,
    Replicas,
    Saturation,
    Seconds,
    SecondsOrZero,
    ServerUrls,
    SettingsFile,
    Share,
    Slots,
    Speed,
    Switch,
    TemplateFile,
    Threads,
    Urgency,
    Url,
    Weights,
)
from pipeline.config.model_options import ModelOptions
from pipeline.config.tables import HttpKeys, ModelTables, Sampling, SamplingTable
from pipeline.wire.subjects import Priority

# The value of `ollama_host` for no Ollama server.
NO_OLLAMA = "none"


class Config(ModelOptions, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The settings in force."""

    nats_url: Annotated[
        Url,
        Setting(
            "URL of the broker, or several of one cluster separated by commas; unless it is set, `headrace up` starts "
            "a broker and the other commands use that one",
            "A URL can contain credentials.",
            section="Broker",
        ),
    ] = "nats://127.0.0.1:4222"
    nats_port: Annotated[
        Port,
        Setting(
            "port of the embedded broker; 0 selects one",
            "With 0, it uses the first of these that is free: the port of its last run, 4222 if no `state_dir` is set, "
            "any port.",
        ),
    ] = 0
    nats_open: Annotated[
        Switch,
        Setting(
            "leave the embedded broker without a password, also if HTTP API keys are in use",
            "With keys in `http_keys`, the embedded broker has a password, which is made once and kept in the state "
            "folder. The other commands of the same user find it.",
        ),
    ] = False
    state_dir: Annotated[
        Folder,
        Setting(
            "folder of the embedded broker's store, the logs and `run.json`; empty selects the user's state folder",
            "The user's state folder depends on the platform: `~/.local/state/headrace` on Linux.",
        ),
    ] = ""
    replicas: Annotated[
        Replicas,
        Setting("copies of each stream: 1, or 3 or 5 in a cluster", "A cluster needs at least as many servers."),
    ] = 1
    lane_max_messages: Annotated[
        Count,
        Setting(
            "number of requests that one lane holds before the broker rejects more",
            "Requests in progress count. A lane is one subject: `llm.request.high.simple` has its own limit.",
        ),
    ] = 10_000
    tenants_max_messages: Annotated[
        Count,
        Setting(
            "number of requests that all named tenants together hold in the lanes of one priority",
            "`lane_max_messages` bounds each lane of each tenant, and names of tenants are without number. The gateway "
            "and `llm.ask` refuse what is beyond this. What is published directly is refused when three times this "
            "and nine full lanes are stored.",
        ),
    ] = 100_000
    tenants_max_lanes: Annotated[
        Count,
        Setting(
            "number of lanes of named tenants that are served at once",
            "A further lane with requests waits until one of them is empty. Each takes about 65 KiB at the broker.",
        ),
    ] = 512
    max_body_bytes: Annotated[
        Bytes,
        Setting(
            "largest request body",
            "A larger one gets the error `request_too_large`. The server configurations in `nats/` accept messages of "
            "8 MB; the server closes the connection of a publisher that exceeds this.",
        ),
    ] = 1 << 20

    files_max_bytes: Annotated[
        Bytes,
        Setting(
            "total size of the files of batches; a further file is refused",
            "Files are deleted after 30 days. See [Batches](batches.md).",
        ),
    ] = 1 << 30
    batch_lines: Annotated[
        Lines,
        Setting(
            "most lines of one batch that are in the queue at once",
            "Up to eight batches run at once. They share the LOW lane with other LOW requests.",
        ),
    ] = 100

    http_host: Annotated[
        Host,
        Setting("address of the HTTP gateway; one that other machines reach requires `http_keys`", section="HTTP"),
    ] = "127.0.0.1"
    http_port: Annotated[
        Port,
        Setting(
            "port of the HTTP gateway; 0 selects one",
            "With 0, the gateway uses 8411 if no `state_dir` is set and the port is free, and any free port otherwise.",
        ),
    ] = 0
    http_keys: Annotated[
        HttpKeys,
        Setting(
            "API keys, as `headrace key` writes them",
            "See [HTTP](http.md#keys-and-limits). Without keys, anyone on this machine can do anything.",
        ),
    ] = field(default_factory=list)
    http_keys_file: Annotated[
        SettingsFile,
        Setting(
            "file whose API keys are read again when it changes; by default the settings file, if it has the keys",
            "Empty if `http_keys` comes from an option or a variable. See [HTTP](http.md#keys-and-limits).",
        ),
    ] = ""
    http_names: Annotated[
        HostNames,
        Setting(
            "host names, beside this machine's own, under which a gateway without keys can be called",
            "A name in the local network that leads here, as by a reverse proxy on this machine. Without keys, anyone "
            "who reaches the gateway under it can do anything.",
        ),
    ] = field(default_factory=list)
    http_origins: Annotated[
        Origins,
        Setting(
            "origins of pages, beside this machine's own, that can call a gateway without keys",
            "For example `app://` for all pages of that scheme, or `null`. Many pages have the origin `null`, foreign "
            "ones in a sandbox included.",
        ),
    ] = field(default_factory=list)
    http_priority: Annotated[Urgency, Setting("priority of a call without `X-Priority` and without a key")] = (
        Priority.MEDIUM
    )
    http_answers_per_s: Annotated[
        Rate,
        Setting(
            "calls for answers that each client can make per second; 0 for no limit",
            "A client that has been idle can make the calls of ten seconds at once.",
        ),
    ] = 100.0
    http_lists_per_s: Annotated[
        Rate, Setting("calls for lists of models that each client can make per second; 0 for no limit")
    ] = 20.0
    http_statistics_per_s: Annotated[
        Rate,
        Setting("calls for statistics, request states and load that each client can make per second; 0 for no limit"),
    ] = 20.0
    http_connections: Annotated[
        Count, Setting("number of connections; the gateway answers further ones with status 503")
    ] = 2000
    http_stall_timeout_s: Annotated[
        Seconds,
        Setting(
            "disconnect a client that takes this long to send a request, or reads nothing of a response for this long"
        ),
    ] = 20.0
    completions_as_chat: Annotated[
        Switch,
        Setting(
            "write the prompt of `/v1/completions` with the model's chat template, as the user's message",
            "By default the model continues the prompt as it is. `raw` in a request overrides the setting.",
        ),
    ] = False
    http_grace_s: Annotated[
        Seconds,
        Setting(
            "keep a request with an `Idempotency-Key` for this long after its client disconnected",
            "A client that sends it again within this time goes on where it was; later, it begins anew. A request "
            "without a key is cancelled at once.",
        ),
    ] = 5.0

    engine: Annotated[
        Engine,
        Setting(
            "engine of the MLX role; `simulated` runs no model, for load tests",
            "The simulated engine takes the time that a model would take. Each of its answers says that it is "
            "simulated.",
            section="MLX engine",
        ),
    ] = "mlx"
    model: Annotated[
        ModelPlace,
        Setting(
            "model: `smollm2`, `demo`, a name that `headrace models` lists, a folder, a GGUF file, or a repository on "
            "the Hugging Face hub",
            "`smollm2` and repositories are fetched at first use: see [Models](models.md). It can be given several "
            "times, in TOML as a list; the first one is the default. A folder of several models names all of them.",
        ),
    ] = "smollm2"
    models: Annotated[
        ModelTables,
        Setting(
            "further models, and settings of single ones, as tables [models.NAME]",
            "The first one is the default if `model` is not set. See [several models](models.md#several-models).",
        ),
    ] = field(default_factory=dict)
    models_bytes: Annotated[
        BytesOrZero,
        Setting(
            "memory for the weights of several models; 0 selects half of what the machine has",
            "Models are loaded when requests ask for them. If they do not all fit, the one that was used least "
            "recently leaves. With one model, the setting has no effect.",
        ),
    ] = 0
    context_tokens: Annotated[
        Number,
        Setting("longest prompt and answer together, in tokens, if the model has more; 0 for no limit of its own"),
    ] = 0
    template_arguments: Annotated[
        Arguments,
        Setting(
            "arguments of the chat template that requests do not set, as {enable_thinking = false}",
            "`chat_template_kwargs` of a request override them.",
        ),
    ] = field(default_factory=dict)
    sampling: Annotated[
        SamplingTable,
        Setting(
            "sampling where a request does not say it, as {temperature = 0.7}",
            "By default it is what the model's `generation_config.json` says.",
        ),
    ] = field(default_factory=Sampling)
    chat_template: Annotated[
        TemplateFile,
        Setting(
            "file with a Jinja chat template to use in place of the model's; empty selects the model's",
            "It applies to MLX. Ollama has templates of its own.",
        ),
    ] = ""
    models_dir: Annotated[
        Folder,
        Setting(
            "folder of fetched and converted models; empty selects the user's cache folder",
            "The user's cache folder depends on the platform: `~/.cache/headrace/models` on Linux.",
        ),
    ] = ""
    offline: Annotated[
        Switch,
        Setting(
            "fetch no model",
            "Without `model`, `headrace up` then uses the demo model unless `smollm2` is stored.",
        ),
    ] = False
    slots: Annotated[
        Slots,
        Setting(
            "most requests that the engine runs at once; 0 for no limit",
            "The engine runs as many as raise its tokens per second, within `inter_token_target_s` and its memory.",
        ),
    ] = 0
    prefill_step_tokens: Annotated[
        Count,
        Setting(
            "most prompt tokens read in one step",
            "The engine reads fewer if more would take longer than `inter_token_target_s`.",
        ),
    ] = 2048
    inter_token_target_s: Annotated[
        Seconds,
        Setting(
            "longest pause between the tokens of an answer",
            "It bounds how much of a prompt is read in one step, and how many answers are written beside a HIGH one.",
        ),
    ] = 0.2
    high_hold_s: Annotated[
        Seconds,
        Setting("longest time that MEDIUM and LOW answers pause while a HIGH prompt is read"),
    ] = 2.0
    max_preemptions: Annotated[
        Number,
        Setting(
            "number of times that one request can lose its place to a more urgent one; 0 turns preemption off",
            "It is suspended meanwhile: it stays with its worker and continues where it stopped.",
        ),
    ] = 8
    max_suspended_s: Annotated[
        Seconds,
        Setting("total time that one request can be suspended; afterwards it continues beside the others"),
    ] = 60.0
    kept_kv_bytes: Annotated[
        BytesOrZero | None,
        Setting(
            "memory for the KV caches of suspended requests and earlier prompts; by default 1/8 of what is free",
            "Beyond it, the engine forgets the prompts that were used least recently. If suspended requests alone "
            "exceed it, the engine reads the prompt and the answer so far again when such a request continues.",
        ),
    ] = None
    prompt_cache: Annotated[
        Switch,
        Setting(
            "keep the KV caches of prompts and answers for later requests that begin alike",
            "Requests of different tenants share none.",
        ),
    ] = True
    prompt_disk_bytes: Annotated[
        BytesOrZero,
        Setting(
            "disk space for the prompt cache of each model, which then survives restarts; 0 for none",
            "Files are written while the engine has nothing to do, in the user's cache folder. They contain what was "
            "said. See [the prompt cache](architecture.md#the-prompt-cache).",
        ),
    ] = 0
    default_max_tokens: Annotated[
        Count,
        Setting(
            "longest answer, in tokens, if the request sets no limit",
            "It is reduced to what fits into the model's context.",
        ),
    ] = 1024
    plain_tool_calls: Annotated[
        Switch,
        Setting(
            "take JSON that names a tool of the request as a call of it, though the model's marks are missing",
            "It must be all that the model said. The answer's `headrace.notes` say so. Small models write such calls.",
        ),
    ] = True
    kv_bytes_limit: Annotated[
        BytesOrZero,
        Setting(
            "memory for the KV caches of the batch; 0 selects half of what the machine has left",
            "Each request counts as if its answer reached its maximum length. With 0, the memory is measured when the "
            "model has been loaded: on a GPU, of the working set that Metal recommends. A single request never gets a "
            "longer context than fits.",
        ),
    ] = 0
    mlx_threads: Annotated[
        Threads,
        Setting(
            "threads of MLX on a CPU; 0 selects the number",
            "With 0, `headrace up` divides the cores between MLX and a second engine on the same CPU, and "
            "`headrace run mlx` uses all cores. Container limits count.",
        ),
    ] = 0
    blas: Annotated[
        BlasLibrary,
        Setting(
            "BLAS library for MLX on Linux CPUs: auto, none, or a shared library",
            "`auto` measures the libraries that it finds and selects the fastest one. `none` uses MLX's own, which is "
            "many times slower. See [the engine process](architecture.md#speed-on-a-cpu).",
        ),
    ] = "auto"
    float32_weights: Annotated[
        Switch,
        Setting(
            "convert the weights to float32 on a CPU if there is enough memory",
            "MLX's CPU build multiplies quantized and 16-bit weights many times slower than float32 ones.",
        ),
    ] = True
    step_timeout_s: Annotated[
        Seconds,
        Setting(
            "restart an engine process that runs requests and completes no step for this long",
        ),
    ] = 60.0
    engine_faults: Annotated[
        Switch,
        Setting(
            "let prompts such as `[[fault:segfault]]` break the engine, for tests",
            "Do not use it where others can publish requests.",
        ),
    ] = False

    simulated_tokens_per_s: Annotated[
        Speed,
        Setting("output tokens per second of the whole batch, with all slots in use", section="Simulated engine"),
    ] = 400.0
    simulated_prefill_tokens_per_s: Annotated[Speed, Setting("prompt tokens per second")] = 4000.0
    simulated_answer_tokens: Annotated[Count, Setting("length of an answer, in tokens")] = 32
    simulated_load_s: Annotated[SecondsOrZero, Setting("time that loading takes")] = 0.0

    weights: Annotated[
        Weights,
        Setting(
            "shares of service of the three priorities",
            "Service is measured in tokens, not in requests.",
            section="Scheduling",
        ),
    ] = field(default_factory=lambda: {Priority.HIGH: 6.0, Priority.MEDIUM: 3.0, Priority.LOW: 1.0})
    floor_share: Annotated[
        Share,
        Setting(
            "minimum share of service of a priority with waiting requests, whatever its weight",
            "Values above one third have the effect of one third.",
        ),
    ] = 0.05
    max_wait_s: Annotated[
        Seconds,
        Setting("a priority whose oldest request has waited longer gets every fourth choice beside its share"),
    ] = 600.0
    prompt_token_cost: Annotated[Cost, Setting("cost of a prompt token to its priority; an output token costs 1")] = 0.1

    lease_s: Annotated[
        Lease,
        Setting(
            "a request that its worker does not renew for this long goes to another worker",
            "A worker renews each of its requests three times in this time.",
            section="Delivery",
        ),
    ] = 3.0
    max_attempts: Annotated[
        Count,
        Setting(
            "attempts before a request that crashes its worker is moved to the dead letters",
            "A delivery that a worker returned does not count.",
        ),
    ] = 3
    default_timeout_s: Annotated[
        Seconds | None,
        Setting("deadline of a request without `Llm-Timeout`; none by default"),
    ] = None
    drain_timeout_s: Annotated[
        Seconds,
        Setting(
            "time to finish running requests after SIGTERM, SIGHUP or Ctrl-C",
            "Afterwards they are returned to the queue.",
        ),
    ] = 20.0

    target_wait_s: Annotated[Seconds, Setting("predicted wait that counts as saturation 1.0", section="Load")] = 2.0
    busy_at: Annotated[Saturation, Setting("saturation at which an engine becomes `busy`; 1.0 is full")] = 0.7
    saturated_at: Annotated[
        Saturation,
        Setting(
            "saturation at which an engine becomes `saturated` and simple requests spill",
            "It must be greater than `busy_at`.",
        ),
    ] = 1.0

    ollama_host: Annotated[
        OllamaHost,
        Setting(
            "Ollama server that requests spill to; empty selects OLLAMA_HOST",
            "If `OLLAMA_HOST` is not set either, it is `127.0.0.1:11434`. `headrace up` replaces no server that you "
            "name, even if it does not answer. With `none`, it looks for no server.",
            section="Ollama",
        ),
    ] = ""
    ollama_slots: Annotated[
        Count, Setting("most requests that Ollama gets at once; it gets one until it is seen to run more")
    ] = 4
    ollama_queue: Annotated[
        Count, Setting("requests that can wait for Ollama beside the running ones; more are not spilled")
    ] = 4
    ollama_standin: Annotated[
        Switch,
        Setting(
            "let `headrace up` start a second engine with Ollama's API if it finds no Ollama server",
            "It is llama.cpp with the model's GGUF file, or the demo model beside the demo model.",
        ),
    ] = True
    ollama_threads: Annotated[
        Threads,
        Setting(
            "threads of the second engine on this machine's CPU; 0 selects the number",
            "With 0, `headrace up` divides the cores as for `mlx_threads`. An Ollama server gets it as `num_thread` "
            "for models that it runs on a CPU.",
        ),
    ] = 0
    ollama_timeout_s: Annotated[
        Seconds, Setting("an Ollama server that sends nothing for this long during an answer has failed")
    ] = 120.0
    ollama_load_timeout_s: Annotated[
        Seconds,
        Setting(
            "time that an Ollama server has to begin an answer, loading its model included",
            "It applies while the server answers other calls. If it does not, `ollama_timeout_s` applies.",
        ),
    ] = 600.0
    ollama_models: Annotated[
        ModelNames,
        Setting(
            "models on Ollama that answer requests without a model, the preferred one first",
            "Without any of them, it is the first available model of `spill_models`, and else the model with the most "
            "parameters whose files fit in half of the memory.",
        ),
    ] = field(default_factory=list)
    spill_models: Annotated[
        ModelPairs,
        Setting(
            'the equivalent on Ollama of each MLX model, as {"mlx-name" = "ollama-name"}',
            "A request that names one of the two can be answered by the other.",
        ),
    ] = field(default_factory=dict)
    internal_models: Annotated[
        ModelNames,
        Setting(
            "models that users cannot request",
            "A name matches with any owner, size or tag. Where llama.cpp is the second engine, it serves the "
            "pipeline's own requests under the first name, with the model that it has.",
        ),
    ] = field(default_factory=lambda: ["tinyllama"])
    classifier_model: Annotated[
        ModelName,
        Setting(
            "model on Ollama that classifies the prompts that triage is unsure of; none by default",
            "Only an internal model is used. A very small one is no help: see "
            "[triage](architecture.md#triage-and-spilling).",
        ),
    ] = ""
    classifier_timeout_s: Annotated[
        Seconds,
        Setting("time for one classification", "A request without a result by then counts as complex."),
    ] = 0.5

    openai: Annotated[
        ServerUrls,
        Setting(
            "server of OpenAI's API that requests spill to, such as http://127.0.0.1:8000; can be given several times",
            "`headrace up` starts a worker for each. `headrace run openai` serves one, and also takes it as `--url`. "
            "`ollama_models`, `spill_models`, `ollama_queue` and the timeouts of Ollama hold for these servers too.",
            section="Other servers",
        ),
    ] = field(default_factory=list)
    openai_key: Annotated[
        ApiKey,
        Setting(
            "API key that is sent to the servers of `openai`; none by default",
            "It is sent to each of them. For servers with different keys, run `headrace run openai` for each.",
        ),
    ] = ""
    openai_slots: Annotated[
        Count,
        Setting("most requests that each server of `openai` gets at once; it gets one until it is seen to run more"),
    ] = 16

    log_level: Annotated[LogLevel, Setting("least severe messages that each process logs", section="Logging")] = "info"


SETTINGS = declared(Config)
KEYS = tuple(SETTINGS)
