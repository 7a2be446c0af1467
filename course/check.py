"""Checks of the exercises. Each check receives the module with the reader's functions. It returns
None if the exercise is solved, else a message about the mistake.

`microvllm learn N --check` calls `verdict(number, work)`.
"""

import random
from types import SimpleNamespace

import torch


def rows_recomputed(work):
    for prompt, new in [(1, 1), (5, 1), (5, 4), (12, 64)]:
        rows, length = 0, prompt
        for _ in range(new):
            rows, length = rows + length, length + 1
        answer = work.rows_recomputed(prompt, new)
        if answer != rows:
            return f"{prompt} prompt tokens, {new} new: expected {rows} rows, got {answer}"
    return None


def kv_bytes(work):
    for shape in [(6, 2, 64, 1, 4), (6, 2, 64, 100, 4), (32, 8, 128, 4096, 2)]:
        layers, heads, dim, tokens, size = shape
        expected = 2 * torch.empty((layers, tokens, heads, dim), device="meta").numel() * size
        answer = work.kv_bytes(*shape)
        if answer != expected:
            return f"kv_bytes{shape}: expected {expected}, got {answer}"
    return None


def idle(lengths, groups):
    """The number of idle rows."""
    total = 0
    for group in groups:
        prompts, news = zip(*[lengths[i] for i in group], strict=True)
        total += len(group) * (max(prompts) + max(news) - 1)
        total -= sum(prompts) + sum(news) - len(group)
    return total


def batches(work):
    rng = random.Random(3)
    lengths = [(rng.randint(5, 20), rng.choice((4, 8, 60, 64))) for _ in range(24)]
    groups = [list(group) for group in work.batches(list(lengths), 4)]
    if sorted(i for group in groups for i in group) != list(range(24)):
        return "each request must be in exactly one batch"
    if not all(1 <= len(group) <= 4 for group in groups):
        return "a batch must have 1 to 4 requests"
    if len(groups) > 6:
        return f"expected at most 6 batches, got {len(groups)}: fill the batches"
    limit = idle(lengths, [range(i, i + 4) for i in range(0, 24, 4)]) // 2
    num_idle = idle(lengths, groups)
    if num_idle > limit:
        return f"expected at most {limit} idle rows, got {num_idle}"
    return None


def calls_needed(work):
    for answers, slots in [([3], 1), ([3, 1, 2], 1), ([3, 1, 2], 2), ([5, 1, 1, 1, 9, 2], 3)]:
        waiting, running, calls = list(answers), [], 0
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
            running = [left - 1 for left in running if left > 1]
            calls += 1
        answer = work.calls_needed(list(answers), slots)
        if answer != calls:
            return f"{answers} in {slots} slots: expected {calls} calls, got {answer}"
    return None


def gather(work):
    memory = torch.arange(8 * 4 * 3.0).view(8, 4, 3)
    for table, length in [([5], 1), ([5], 4), ([5, 2, 7], 9), ([6, 0, 3], 12)]:
        expected = torch.stack([memory[table[i // 4], i % 4] for i in range(length)])
        answer = work.gather(memory, list(table), length)
        if not isinstance(answer, torch.Tensor) or answer.shape != expected.shape:
            return f"table {table}, {length} tokens: expected a tensor {tuple(expected.shape)}"
        if not answer.equal(expected):
            return f"table {table}, {length} tokens: these are not the rows of the text"
    return None


def write(work):
    for count, expected in [(1, None), (2, (1, 4)), (3, (1, 4))]:
        ref_count, free, table = [0, count, 1, 1, 0], [0, 4], [2, 1]
        answer = work.write(ref_count, free, table, 1)
        if (tuple(answer) if answer else None) != expected:
            return f"a block in {count} tables: expected {expected}, got {answer}"
        state = (
            ([2, 4], [0, count - 1, 1, 1, 1], [0])
            if expected
            else ([2, 1], [0, 1, 1, 1, 0], [0, 4])
        )
        answer = table, ref_count, free
        if answer != state:
            names = "table, ref_count, free"
            return f"a block in {count} tables: expected {names} {state}, got {answer}"
    return None


def hashes(work):
    a, b = list(range(12)), [9, *range(1, 12)]
    if [len(work.hashes(a[:n], 4)) for n in (0, 3, 4, 11, 12)] != [0, 0, 1, 2, 3]:
        return "each full block must have a hash, and no other block"
    if list(work.hashes(a, 4)) != list(work.hashes(list(a), 4)):
        return "equal texts must have equal hashes"
    if list(work.hashes(a + [1], 4)) != list(work.hashes(a, 4)):
        return "tokens after a block must not change its hash"
    if set(work.hashes(a, 4)) & set(work.hashes(b, 4)):
        return "two texts that differ in their first token share a hash, but their K and V differ"
    if len(set(work.hashes([1] * 12, 4))) != 3:
        return "equal blocks at different positions share a hash, but their K and V differ"
    return None


def victim(work):
    for running, expected in [
        ([(40, 0, 3), (20, 0, 2)], 1),
        ([(40, 32, 3), (20, 0, 2)], 0),
        ([(40, 32, 0), (20, 0, 2), (30, 0, 2)], 1),
        ([(90, 64, 2), (33, 16, 1), (35, 32, 0)], 1),
    ]:
        answer = work.victim(list(running))
        if answer != expected:
            return f"{running}: expected index {expected}, got {answer}"
    return None


def shares(work):
    for needs, budget, expected in [
        ([1, 1, 1], 8, [1, 1, 1]),
        ([30, 1, 1], 8, [6, 1, 1]),
        ([3, 30, 1], 8, [3, 4, 1]),
        ([30, 1, 1, 1], 2, [0, 1, 1, 0]),
        ([], 8, []),
    ]:
        answer = list(work.shares(list(needs), budget))
        if answer != expected:
            return f"needs {needs}, budget {budget}: expected {expected}, got {answer}"
    return None


def blocks_at_end(work):
    from microvllm.blocks import BlockManager, BlockPool
    from microvllm.scheduler import Scheduler, Sequence

    for prompt, new, n, size in [(10, 1, 3, 4), (10, 5, 1, 4), (10, 5, 3, 4), (8, 5, 3, 4)]:
        pool, num_held = BlockPool(99), 0
        scheduler = Scheduler(BlockManager(pool, size), max_batch_size=8, max_batched_tokens=512)
        params = SimpleNamespace(n=n, max_tokens=new)
        scheduler.add(Sequence(0, [1] * prompt, params))
        turn = 100
        while scheduler.waiting or scheduler.running:
            plan = scheduler.schedule()
            num_held = pool.num_usable - pool.num_free
            scheduler.update(plan, [turn := turn + 1 for _ in plan.draws])
        answer = work.blocks_at_end(prompt, new, n, size)
        if answer != num_held:
            case = f"{n} samples, prompt {prompt}, new {new}, block size {size}"
            return f"{case}: expected {num_held}, got {answer}"
    return None


CHECKS = [rows_recomputed, kv_bytes, batches, calls_needed, gather, write, hashes, victim, shares,
          blocks_at_end]  # fmt: skip


def verdict(number, work):
    """The mistake in exercise `number` of the module `work`; None if it is solved."""
    try:
        return CHECKS[number - 1](work)
    except NotImplementedError:
        return "you haven't implemented this yet"
    except Exception as error:  # the reader's own code may raise anything
        return f"it raised {type(error).__name__}: {error}"
