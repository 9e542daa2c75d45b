"""The examples in docstrings run as they stand, with the names that their readers would have."""

import doctest
from typing import Any

import pytest

from longformer_core import (
    EncodingEngine,
    EncodingRequest,
    Engine,
    GenerationConfig,
    Handle,
    LongformerConfig,
    LongformerModel,
    Request,
    Tokens,
)
from tests.longformer_core.encoding.helpers import SMALL, classifier
from tests.longformer_core.generation.helpers import models


def generation_names() -> dict[str, Any]:
    model, _ = models(3)
    return {
        "Engine": Engine,
        "GenerationConfig": GenerationConfig,
        "Request": Request,
        "Tokens": Tokens,
        "model": model,
        "engine": Engine(model),
        "options": GenerationConfig(num_beams=2, max_new_tokens=5),
    }


@pytest.mark.parametrize("owner", [Engine, Request, Handle])
def test_examples_of_generation(owner: type) -> None:
    run_examples(owner, generation_names())


@pytest.mark.parametrize("owner", [EncodingEngine, EncodingRequest])
def test_examples_of_encoding(owner: type) -> None:
    names = {
        "EncodingEngine": EncodingEngine,
        "EncodingRequest": EncodingRequest,
        "classifier": classifier(),
        "encoder": LongformerModel(LongformerConfig(**SMALL)).eval(),
    }
    run_examples(owner, names)


def run_examples(owner: type, names: dict[str, Any]) -> None:
    """Run what stands in the docstring of a class."""
    (example,) = doctest.DocTestFinder(recurse=False).find(owner, owner.__name__, globs=names)
    assert example.examples
    problems: list[str] = []
    result = doctest.DocTestRunner().run(example, out=problems.append)
    assert not result.failed, "".join(problems)
