"""Jobs run on the same embedded Ray as the pipelines' tests."""

from tests.pipelines.conftest import ray_session

__all__ = ["ray_session"]
