"""What one would write without Longhaul: transformers in a Serve deployment, batched and padded.

    python -m tests.bench.plain_serve MODEL PORT summarize|embed

The rival of `tests.bench.serve`, in a process of its own; it prints a line when it serves.
"""

import sys
import threading
from typing import Any

import ray
import torch
import transformers
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request

BATCH, WAIT_S = 8, 0.05
GENERATE = {"num_beams": 4, "max_new_tokens": 32, "min_length": 32}


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Plain:
    """The usual answer: collect some requests, pad them to the longest, run the model."""

    def __init__(self, model: str, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.kind = kind
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        auto: Any = (
            transformers.AutoModelForSeq2SeqLM if kind == "summarize" else transformers.AutoModel
        )
        self.model: Any = auto.from_pretrained(model).eval()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
    async def run(self, texts: list[str]) -> list[Any]:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            if self.kind == "embed":
                states = self.model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None]
                return list(((states * mask).sum(1) / mask.sum(1)).tolist())
            marks = torch.zeros_like(inputs["input_ids"])
            marks[:, 0] = 1
            ids = self.model.generate(**inputs, global_attention_mask=marks, **GENERATE)
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    async def __call__(self, request: Request) -> Any:
        found = await self.run((await request.json())["inputs"])
        return [found] if self.kind == "embed" else [{"summary_text": found}]


def main() -> None:
    model, port, kind, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    transformers.utils.logging.set_verbosity_error()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(Plain.bind(model, kind, threads), name="longhaul", route_prefix="/")  # type: ignore[attr-defined]
    print("curl ", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
