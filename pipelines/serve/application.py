"""The graph of a served model, for `serve.run` and for Serve's configs.

proxy -> Gateway (CPU, at least 2) -> Model (one engine each, GPU or CPU, autoscaled)
"""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from pipelines.serve.gateway import Gateway
from pipelines.serve.model import Model
from pipelines.serve.options import ServeOptions, make_task
from pipelines.serve.scaling import by_queued_tokens

IMPORT_PATH = "pipelines.serve.application:build"
DEPLOYMENTS = ("Gateway", "Model")
# Serve counts requests; what counts here is tokens, so its own limits lie far above.
_MAX_ONGOING = 1024
# What a request may take beside its deadline, before a replica that ends is killed.
_DRAIN_S = 30.0
_GATEWAY_CPUS = 0.5
# glibc returns large tensors to the system each time, which clears every page that it hands out.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)
}  # fmt: skip


def build(arguments: dict[str, Any]) -> serve.Application:
    """Return the application of these options (`ServeOptions`); a Serve config names this function.

    Raises: ValidationError or Refused for options that are wrong.
    """
    options = ServeOptions(**arguments)
    task = make_task(options)
    settings = deployment_settings(options)
    gateway = serve.deployment(serve.ingress()(Gateway), name="Gateway", **settings["Gateway"])
    model = serve.deployment(Model, name="Model", **settings["Model"])
    application: serve.Application = gateway.bind(model.bind(task, options), task, options)
    return application


def deployment_settings(options: ServeOptions) -> dict[str, dict[str, Any]]:
    """Return how each deployment is run, by its name."""
    common = {
        "max_ongoing_requests": _MAX_ONGOING,
        "max_queued_requests": _MAX_ONGOING,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "graceful_shutdown_timeout_s": options.timeout_s + _DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5.0,
    }
    threads = options.threads or 1
    is_gpu = options.device == "cuda"
    least, most = options.min_replicas, options.most_replicas
    spread: dict[str, Any] = {"num_replicas": least}
    if least != most:
        policy = AutoscalingPolicy(policy_function=by_queued_tokens)
        spread = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                initial_replicas=max(1, least),
                upscale_delay_s=1.0,
                downscale_delay_s=30.0,
                metrics_interval_s=1.0,
                look_back_period_s=3.0,
                policy=policy,
            )
        }
    return {
        "Gateway": common
        | {
            "num_replicas": options.num_gateways,
            "ray_actor_options": {"num_cpus": _GATEWAY_CPUS},
            # A gateway is small: the new one is there before the old one goes.
            "max_surge_percent": 100,
        },
        "Model": common
        | spread
        | {
            "ray_actor_options": {
                "num_cpus": 1 if is_gpu else threads,
                "num_gpus": int(is_gpu),
                "runtime_env": {"env_vars": {} if is_gpu else _ENVIRONMENT},
            },
            "health_check_timeout_s": 90.0,
            # A new replica on a GPU needs a free one; on CPUs nobody waits while it loads.
            "max_surge_percent": 0 if is_gpu else 100,
        },
    }
