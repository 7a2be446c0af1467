"""Prompts in groups. A step of decodes alone was recorded (graphs.py); of one with a prompt in it
the host launches each kernel, and the device waits for the host. In a full batch sequences end one
by one: if each were replaced at once, hardly a step would be without a prompt."""

from ..scheduler import Scheduler

GROUPS = 32  # of max_batch_size: so many places at most, one of them, stay empty for a while


class GroupScheduler(Scheduler):
    """Admits none until there is room for a group, or for all that wait. A sequence's tokens do not
    depend on when it runs."""

    def admit(self, chunks, budget):
        places = self.max_batch_size - sum([1 + seq.forks for seq in self.running])
        decodes = self.max_batched_tokens - budget == len(chunks) > 0  # would the step be recorded?
        if decodes and places < min(self.max_batch_size // GROUPS, len(self.waiting)):
            return budget
        return super().admit(chunks, budget)
