"""A served model on a cluster: begun, waited for, drained."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from pipelines.errors import RunFailed
from pipelines.serve import door
from pipelines.serve.application import build
from pipelines.serve.options import ServeOptions

APPLICATION = "longhaul"
# The proxy's own limit stands behind the request's, whose answer says more.
PROXY_GRACE_S = 30.0
LOGGING = {"encoding": "JSON"}
# Serve's processes read these as they start.
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": door.CALLBACK,
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


@contextlib.contextmanager
def serving(options: ServeOptions, host: str, port: int) -> Iterator[str]:
    """Serve a model on the cluster this process is in, for this block; yield the URL.

    At its end requests that were begun are answered, and Serve goes.
    Raises: RunFailed where the model does not come up.
    """
    application = build(options.model_dump())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(
            host=host, port=port, request_timeout_s=options.timeout_s + PROXY_GRACE_S
        ),
        logging_config=LOGGING,
    )
    try:
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config=LOGGING)
        except RuntimeError as error:
            raise RunFailed(f"the model did not come up: {error}") from error
        yield f"http://{host}:{port}"
    finally:
        if ray.is_initialized():
            # Waits for requests that were begun. Other applications of a shared cluster stay.
            serve.delete(APPLICATION)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Set what Serve's processes read as they start; around the start of an embedded cluster."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
