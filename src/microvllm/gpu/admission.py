"""Prompts are admitted in groups: a policy for engines whose decode steps are CUDA graphs.

A step with decodes alone is replayed (graphs.py). In a step with a prompt, the host launches each
kernel, and the device waits for the host. In a full batch, sequences end one by one. If each were
replaced at once, almost every step would have a prompt.
"""

from ..scheduler import Plan, Scheduler

GROUPS = 32  # a group has max_batch_size // GROUPS sequences; their places are empty until then


def in_groups(scheduler: Scheduler, plan: Plan) -> bool:
    """Admit waiting sequences only if there are places for a group or for all of them, or if the
    step cannot be replayed anyway. The tokens of a sequence do not depend on when it runs."""
    has_only_decodes = plan.num_tokens == len(plan.chunks) > 0
    group_size = min(scheduler.max_batch_size // GROUPS, len(scheduler.waiting))
    return not has_only_decodes or scheduler.num_free_places >= group_size
