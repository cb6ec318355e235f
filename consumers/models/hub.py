"""The process that fetches a repository from the Hugging Face hub: `python -m consumers.models.hub NAME FOLDER`.

It prints the number of bytes to fetch, and fetches what is missing in the folder. An error is one line on standard
error.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from pathlib import Path
from typing import Final

# The files that a model in MLX's format consists of, as mlx_lm selects them.
_PATTERNS: Final = (
    *("*.json", "*.jsonl", "*.jinja", "*.py", "*.txt"),
    *("model*.safetensors", "tokenizer.model", "*.tiktoken"),
)


def fetch(repository: str, folder: Path) -> str:
    """Fetch a repository into a folder. Returns what is wrong, or an empty text."""
    try:
        from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 - absent where MLX is
    except ImportError:
        return "huggingface_hub is not installed; it comes with mlx-lm."
    try:
        info = HfApi().model_info(repository, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = [name for name in sizes if any(fnmatch.fnmatch(name, pattern) for pattern in _PATTERNS)]
        if "config.json" not in wanted or not any(name.endswith(".safetensors") for name in wanted):
            files = [name for name in sizes if name.endswith(".gguf")]
            hint = f" It has GGUF files: pull one by its address ({files[0]})." if files else ""
            return f"{repository} is not a model that MLX can load: it has no config.json or no safetensors.{hint}"
        sys.stdout.write(f"{sum(sizes[name] for name in wanted)}\n")
        sys.stdout.flush()
        snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=list(_PATTERNS))
    except Exception as error:  # of the hub, of its HTTP client or of the disk
        return f"Cannot fetch {repository} from the Hugging Face hub ({' '.join(str(error).split())})."
    return ""


def main() -> int:
    """Fetch as the arguments say, and return the exit code."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    trouble = fetch(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.write(trouble)
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
