"""How many model replicas there should be: so many that documents wait no longer than wanted."""

import math
from typing import Any

# What a replica reports: how many replicas like itself its queue would keep busy for the time that
# a document may wait.
STATISTIC = "wanted_replicas"


def by_queued_tokens(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy hook: the sum of what all replicas would want, within the bounds.

    It runs in Serve's controller about ten times a second and must not raise. Until replicas have
    reported the number stays as it is. Without any the first request brings one.
    """
    if not context.target_num_replicas:
        return int(context.total_num_requests > 0), {}
    reported = (context.aggregated_metrics or {}).get(STATISTIC) or {}
    if not reported:
        return context.target_num_replicas, {}
    wanted = math.ceil(sum(reported.values()) - 1e-6)
    least = context.capacity_adjusted_min_replicas
    return max(least, min(wanted, context.capacity_adjusted_max_replicas)), {}
