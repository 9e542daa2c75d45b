"""A batch run on a local cluster of two nodes that loses one on the way.

`python -m tests.pipelines.drive_two_nodes '<json>'`, with the arguments of `drive`.
"""

import json
import sys
import threading
from typing import Any

import ray
from ray.cluster_utils import Cluster

from jobs.options import exit_code
from tests.pipelines.drive import drive
from tests.pipelines.driving import num_committed, wait_for


def drive_two_nodes(**arguments: Any) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    second = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)

    def remove() -> None:
        wait_for(lambda: num_committed(arguments["output"]) >= 4, "the fourth block")
        cluster.remove_node(second, allow_graceful=False)
        print("a node was removed", flush=True)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    try:
        drive(**arguments)
        remover.join()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    sys.exit(exit_code(lambda: drive_two_nodes(**given)))
