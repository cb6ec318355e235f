"""How fast the engine would compute here (`python -m consumers.engines.local.measure BLAS THREADS`), as JSON.

`headrace doctor` runs it. It selects the BLAS library as the engine does, and measures in a child process as the engine
computes in one: a broken installation can crash the process that imports MLX.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from consumers.engines.local.blas import selected, threads_environment
from pipeline.process.python import module_command


async def _measured(wanted: str, threads: int) -> int:
    blas = await selected(wanted, threads)
    process = await asyncio.create_subprocess_exec(
        *(*module_command("consumers.engines.local.child.speed"), blas.library if blas else ""),
        env=os.environ | threads_environment(threads),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    if process.returncode != 0:
        return process.returncode or 1
    print(json.dumps(json.loads(out) | {"blas": blas.name if blas else "its own BLAS"}))  # noqa: T201 - the result
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_measured(sys.argv[1], int(sys.argv[2]))))
