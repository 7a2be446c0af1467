"""Solutions of course/exercises.py, with which the checks are checked."""


def rows_recomputed(prompt, new):
    return sum(range(prompt, prompt + new))


def kv_bytes(layers, kv_heads, head_dim, tokens, number_bytes):
    return 2 * layers * kv_heads * head_dim * tokens * number_bytes


def batches(lengths, size):
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i][1] // 10, lengths[i][0]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def calls_needed(answers, slots):
    ends = [0] * slots
    for answer in answers:
        first = ends.index(min(ends))
        ends[first] += answer
    return max(ends)


def gather(memory, table, length):
    return memory[table].flatten(0, 1)[:length]


def write(ref_count, free, table, index):
    source = table[index]
    if ref_count[source] == 1:
        return None
    target = table[index] = free.pop()
    ref_count[source] -= 1
    ref_count[target] = 1
    return source, target


def hashes(tokens, block_size):
    found = []
    for i in range(len(tokens) // block_size):
        found.append(hash(((found or [0])[-1], *tokens[i * block_size : (i + 1) * block_size])))
    return found


def victim(running):
    candidates = [i for i, (_, _, blocks) in enumerate(running) if blocks]
    return min(candidates, key=lambda i: running[i][0] - running[i][1])


def shares(needs, budget):
    given = [0] * len(needs)
    for small in (True, False):
        for i, need in enumerate(needs):
            if (need == 1) == small:
                given[i] = min(need, budget)
                budget -= given[i]
    return given


def blocks_at_end(prompt, new, n, block_size):
    shared = prompt // block_size
    stored = prompt + new - 1
    own = -(-stored // block_size) - shared
    return shared + n * own if stored > prompt else -(-prompt // block_size)
