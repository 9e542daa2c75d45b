"""The page in a real browser: it asks, streams, stops, and talks to nobody else."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipelines.every_task import CASES, good_rows
from tests.pipelines.serve.browser import CHROMIUM, Page, page
from tests.pipelines.serve.serving import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

ROW = good_rows(1)[0]
# Where to keep pictures, to be looked at.
PICTURES = os.environ.get("LONGHAUL_PICTURES")


async def ask(tab: Page, server: Server, text: str, second: str = "") -> None:
    """Type, and press the button."""
    await tab.wait_for(f'document.title.startsWith("{server.name}")')
    for name, value in (("text", text), ("second", second)):
        await tab.run(
            f'{{ const box = document.getElementById("{name}"); box.value = {json.dumps(value)};'
            f'box.dispatchEvent(new Event("input", {{bubbles: true}})) }}'
        )
    await tab.run('document.getElementById("go").click()')


async def answer(tab: Page) -> str:
    await tab.wait_for('document.getElementById("go").disabled === false')
    text: str = await tab.run('document.getElementById("answer").textContent')
    return text


def test_a_summary_is_streamed_and_stopped(
    server_of: Callable[[str], Server], tmp_path: Path
) -> None:
    server = server_of("summarize")
    asked = {"num_beams": 1, "max_new_tokens": 40}
    expected = server.post(
        "/", {"inputs": ROW["text"], "parameters": {"generate_parameters": asked}}
    ).json()[0]

    async def use() -> None:
        async with page(f"{server.url}/playground", tmp_path) as tab:
            await tab.wait_for('document.title.includes("Longhaul")')
            await tab.run('document.getElementById("beams").value = "1"')
            await tab.run('document.getElementById("most").value = "40"')
            await ask(tab, server, ROW["text"])
            assert await answer(tab) == expected["summary_text"]
            usage = await tab.run('document.getElementById("usage").textContent')
            assert usage.startswith(f"{expected['usage']['tokens_in']} tokens in")
            curl = await tab.run('document.getElementById("curl").textContent')
            assert curl.startswith(f"curl {server.url}/ ")
            if PICTURES:
                await tab.picture(Path(PICTURES, "summarize.png"))
            await ask(tab, server, "long " * 400)
            assert "max_source_tokens" in await answer(tab)
            assert await tab.run('document.getElementById("answer").className') == "error"
            await ask(tab, server, ROW["text"])
            await tab.run('document.getElementById("stop").click()')
            await answer(tab)
            assert await tab.run('document.getElementById("usage").textContent') == "stopped"
            assert tab.requested
            own = (server.url, "about:", "data:")
            assert [url for url in tab.requested if not url.startswith(own)] == []
            refused = [c for c in tab.complaints if "422" not in c and "favicon" not in c]
            assert refused == []

    asyncio.run(use())


@pytest.mark.parametrize(
    "name",
    [
        name if name == "tag" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
        if name != "summarize"
    ],
)
def test_every_task_has_its_answer_shown(
    name: str, server_of: Callable[[str], Server], tmp_path: Path
) -> None:
    server = server_of(name)
    second = {"answer": ROW["query"], "choose": "\n".join(ROW["choices"])}.get(name, "")
    text = f"{ROW['text']} <mask>" if name == "fill" else f"😀 {ROW['text']}"
    inputs = {
        "answer": {"question": second, "context": text},
        "choose": {"prompt": text, "choices": ROW["choices"]},
    }.get(name, text)
    found = server.post("/", {"inputs": inputs}).json()
    said = {
        "answer": lambda: [found["answer"]],
        "choose": lambda: [each["choice"] for each in found],
        "classify": lambda: [each["label"] for each in found[0]],
        "embed": lambda: [f"{len(found[0])} numbers"],
        "fill": lambda: [each["token_str"] for each in found],
        "tag": lambda: [f"{each['word']}{each['entity_group']}" for each in found],
    }[name]()

    async def use() -> None:
        async with page(f"{server.url}/playground", tmp_path) as tab:
            await ask(tab, server, text, second)
            shown = await answer(tab)
            assert said
            assert [each for each in said if each not in shown] == []
            if PICTURES:
                await tab.picture(Path(PICTURES, f"{name}.png"))

    asyncio.run(use())
