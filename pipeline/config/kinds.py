"""The kinds of values that settings have: the type of each, and what its values are called."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from msgspec import Meta

from pipeline.config.declaring import ValueKind
from pipeline.wire.subjects import Priority

# Excludes infinity.
_MOST = sys.float_info.max

Port = Annotated[int, Meta(ge=0, le=65535), ValueKind("PORT", "a port number (0 to 65535)")]
Count = Annotated[int, Meta(ge=1), ValueKind("N", "a whole number of 1 or more")]
Threads = Annotated[int, Meta(ge=0, le=1024), ValueKind("N", "a whole number from 0 to 1024")]
Lines = Annotated[int, Meta(ge=1, le=1000), ValueKind("N", "a whole number from 1 to 1000")]
Number = Annotated[int, Meta(ge=0), ValueKind("N", "a whole number of 0 or more")]
Slots = Annotated[int, Meta(ge=0, le=1024), ValueKind("N", "a whole number from 0 to 1024")]
Bytes = Annotated[int, Meta(ge=1), ValueKind("BYTES", "a number of bytes, 1 or more")]
BytesOrZero = Annotated[int, Meta(ge=0), ValueKind("BYTES", "a number of bytes, 0 or more")]
Seconds = Annotated[float, Meta(gt=0, le=_MOST), ValueKind("SECONDS", "a number of seconds greater than 0")]
SecondsOrZero = Annotated[float, Meta(ge=0, le=_MOST), ValueKind("SECONDS", "a number of seconds, 0 or more")]
Lease = Annotated[float, Meta(ge=1, le=_MOST), ValueKind("SECONDS", "a number of seconds, 1 or more")]
Rate = Annotated[float, Meta(ge=0, le=_MOST), ValueKind("RATE", "a rate of 0 or more")]
Speed = Annotated[float, Meta(gt=0, le=_MOST), ValueKind("RATE", "a rate greater than 0")]
Share = Annotated[float, Meta(ge=0, le=1), ValueKind("SHARE", "a number from 0 to 1")]
Cost = Annotated[float, Meta(ge=0, le=_MOST), ValueKind("COST", "a number of 0 or more")]
Saturation = Annotated[float, Meta(gt=0, le=_MOST), ValueKind("SATURATION", "a number greater than 0")]
Url = Annotated[str, ValueKind("URL", "a URL")]
Folder = Annotated[str, ValueKind("DIR", "the name of a folder")]
SettingsFile = Annotated[str, ValueKind("FILE", "the name of a file")]
TemplateFile = Annotated[str, ValueKind("FILE", "the name of a file")]
Host = Annotated[str, ValueKind("HOST", "a host name or an address")]
OllamaHost = Annotated[str, ValueKind("HOST", "a host, `host:port`, URL or `none`")]
BlasLibrary = Annotated[str, ValueKind("NAME_OR_PATH", "auto, none, or a shared library")]
ModelName = Annotated[str, ValueKind("MODEL", "the name of a model")]
ModelPlace = Annotated[str, ValueKind("NAME_OR_PATH", "the name, the folder or the GGUF file of a model", repeats=True)]
Urgency = Annotated[Priority, ValueKind("PRIORITY", "a priority (high, medium or low)")]
Engine = Annotated[Literal["mlx", "simulated"], ValueKind("ENGINE", "an engine (mlx or simulated)")]
Replicas = Annotated[Literal[1, 3, 5], ValueKind("N", "a number of copies (1, 3 or 5)")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], ValueKind("LEVEL", "a log level (debug, info, warning or error)")
]
Weights = Annotated[
    dict[Priority, Annotated[float, Meta(gt=0, le=_MOST)]],
    Meta(min_length=len(Priority)),
    ValueKind("TABLE", "a table with a number greater than 0 for each of high, medium and low"),
]
ModelPairs = Annotated[dict[str, str], ValueKind("TABLE", "a table of model names")]
ModelNames = Annotated[list[str], ValueKind("LIST", "a list of model names")]
ServerUrls = Annotated[list[str], ValueKind("URL", "a list of URLs of servers", repeats=True)]
ApiKey = Annotated[str, Meta(pattern=r"^[!-~]*$"), ValueKind("KEY", "an API key", "A key has no spaces.", secret=True)]
Arguments = Annotated[dict[str, Any], ValueKind("TABLE", "a table of arguments")]
# As a browser writes it in `Origin`, or a scheme with `://`.
Origins = Annotated[
    list[Annotated[str, Meta(pattern=r"^(null|[A-Za-z][A-Za-z0-9+.-]*://[^\s/]*)$")]],
    ValueKind("LIST", "a list of origins, such as https://chat.example, app:// or null"),
]
# An address of IPv6 has several colons and no brackets.
HostNames = Annotated[
    list[Annotated[str, Meta(pattern=r"^([^\s/:@\[\]]+|[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,})$")]],
    ValueKind("LIST", "a list of host names without ports"),
]
Switch = Annotated[bool, ValueKind("", "true or false")]
AdapterFolder = Annotated[str, ValueKind("DIR", "the name of a folder")]
AdapterFolders = Annotated[dict[str, str], ValueKind("TABLE", "a table of names and folders")]
DraftPlace = Annotated[str, ValueKind("NAME_OR_PATH", "the name or the folder of a model")]
DraftTokens = Annotated[int, Meta(ge=1, le=16), ValueKind("N", "a number of tokens, 1 to 16")]
KvBits = Annotated[Literal[0, 2, 3, 4, 5, 6, 8], ValueKind("BITS", "a number of bits (0, 2, 3, 4, 5, 6 or 8)")]
KvGroup = Annotated[Literal[32, 64, 128], ValueKind("N", "a size of groups (32, 64 or 128)")]
KvTokens = Annotated[int, Meta(ge=0), ValueKind("TOKENS", "a number of tokens, 0 or more")]
