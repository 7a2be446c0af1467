"""Prompts in groups, a policy for LLMs whose decode steps are CUDA graphs (graphs.py).

A step of decodes alone is replayed; of one with a prompt in it the host launches each kernel, and
the device waits for the host. In a full batch sequences end one by one: if each were replaced at
once, hardly a step would be without a prompt.
"""

from ..scheduler import Plan, Scheduler

GROUPS = 32  # of max_batch_size: at most that many places, one of them, stay empty for a while


def in_groups(scheduler: Scheduler, plan: Plan) -> bool:
    """Admit waiting sequences only if there is room for a group, or for all that wait, or if the
    step would not be replayed anyway. A sequence's tokens do not depend on when it runs."""
    has_only_decodes = plan.num_tokens == len(plan.chunks) > 0
    group_size = min(scheduler.max_batch_size // GROUPS, len(scheduler.waiting))
    return not has_only_decodes or scheduler.num_free_places >= group_size
