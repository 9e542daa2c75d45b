"""The gateway's replica in Serve: the API, over the model's replicas. It computes nothing."""

from typing import Any

from fastapi import FastAPI

from pipelines.serve.app import make_app
from pipelines.serve.exposition import Exposition
from pipelines.serve.keys import KeyFile
from pipelines.serve.metrics import Metrics
from pipelines.serve.options import ServeOptions
from pipelines.serve.replicas import Replicas
from pipelines.serve.service import Service
from pipelines.tasks.base import Task
from pipelines.tasks.preparation import tokenizer_of


class Gateway:
    """A deployment with `serve.ingress()`: Serve asks it for the application when it is there."""

    def __init__(self, model: Any, task: Task, options: ServeOptions) -> None:
        metrics = Metrics(options.public_name)
        replicas = Replicas(model, on_retry=lambda: metrics.count("retries"))
        self._service = Service(task, replicas, options, metrics=metrics)
        self._keys = KeyFile(options.keys_file) if options.keys_file else None
        tokenizer_of(task.model)  # before the first request wants it

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._service, self._keys, exposition=Exposition())
