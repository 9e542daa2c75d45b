"""What Prometheus reads at /metrics: Longhaul's and Serve's series of every node."""

import asyncio
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import ray

_TIMEOUT_S = 5.0
_OURS = ("ray_longhaul_", "ray_serve_")


class Exposition:
    """Asks the agent of each node for its series; a node that does not answer is left out."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="longhaul-metrics")

    async def text(self) -> str:
        """Return the series, each with its help once."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._read)

    def _read(self) -> str:
        lines: dict[str, None] = {}
        for node in ray.nodes():
            port = node.get("MetricsExportPort")
            if not node["Alive"] or not port:
                continue
            url = f"http://{node['NodeManagerAddress']}:{port}/metrics"
            try:
                with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
                    text = response.read().decode("utf-8", "replace")
            except OSError:
                continue
            lines |= dict.fromkeys(line for line in text.splitlines() if _is_ours(line))
        return "\n".join(lines) + "\n"


def _is_ours(line: str) -> bool:
    name = line.split(" ", 3)[2] if line.startswith("# ") and line.count(" ") >= 3 else line
    return name.startswith(_OURS)
