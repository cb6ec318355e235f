"""The MLX worker: requests of all lanes, answered by the model in the supervised child process."""

from __future__ import annotations

from consumers.engines.local.process import EngineProcess
from consumers.models.names import located, served_name_of
from pipeline.config import Config
from pipeline.delivery.taking import MLX_SOURCE
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role
from pipeline.worker.worker import Worker


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    model_path, served_name = located(config.model), served_name_of(config.model)
    async with (
        role("mlx", config) as me,
        EngineProcess(config, model_path=model_path, served_name=served_name) as engine,
    ):
        await Worker(me, engine, config, MLX_SOURCE).run(lifecycle)
