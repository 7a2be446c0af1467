"""Three hints for each exercise; `microvllm lab hint N` shows one at a time."""

HINTS = {
    1: (
        "A block of 16 holds the K and V of 16 tokens. A part-filled block counts as a whole one.",
        "Which token's K and V are never computed? The last token is never an input.",
        "Count prompt + new - 1 tokens, and round up to whole blocks: -(-a // b) rounds up.",
    ),
    2: (
        "The table is in the order of the text: its first entry is the block of the first tokens.",
        "position // block_size is the index in the table, position % block_size the offset.",
        "Block b begins at slot b * block_size.",
    ),
    3: (
        "Read `BlockManager.grow`: it does two things. Which lines record a copy?",
        "Override `grow`. It must still allocate blocks, or return False if too few are free.",
        "Extend seq.block_table with self.pool.allocate() until it has blocks_for(stop) entries.",
    ),
    4: (
        "The first new token is drawn from logits. The logits of which token?",
        "`Sequence.max_cached_tokens` is the number of tokens that may come from the cache.",
        "64 tokens are four blocks. How long must a prompt be so that four blocks may be found?",
    ),
    5: (
        "K and V of a token depend on all tokens before it, but this hash does not.",
        "You need an equal block after two different prefixes. One prefix may be empty.",
        "First: 16 tokens, then 16 other tokens X, and one more. Second: X, and one more.",
    ),
    6: (
        "Which step needs the most blocks? For each step, sum over the requests that still run.",
        "In step s, a request has prompt + s - 1 computed tokens, if it gets at least s new ones.",
        "Round each number up to blocks, sum, take the largest sum, and add 1: the null block.",
    ),
    7: (
        "`cheapest` of lab/policies.py is not enough. How many blocks does each victim free?",
        "A block in two tables does not become free. pool.ref_count counts the tables.",
        "Divide the lost tokens (num_computed) by the number of blocks that become free.",
    ),
    8: (
        "Shortest first is good for the mean, but a long request may wait forever. Prevent that.",
        "A policy has no clock, but scheduler.num_output_tokens only grows. Note it on arrival.",
        "Take the smallest length - waiting time / k, and try some k between 5 and 30.",
    ),
    9: (
        "Belady, 1966: evict the block that is needed last. Its hash is pool.hash_of[block].",
        "For each block of pool.cached, find the first set in `future` that contains its hash.",
        "First evict blocks that are in no set. Among equal blocks, take the first of pool.cached.",
    ),
    10: (
        "The next token is at position num_computed. What is the first position it attends to?",
        "It is num_computed - window. Later tokens attend to later positions.",
        "Only whole blocks before that position: max(0, num_computed - window) // size of them.",
    ),
    11: (
        "Write down steps 1 and 2 first. A step computes at most 32 tokens, so 40 take two steps.",
        "When its prompt is computed, a sequence forks: two tables, one part-filled block.",
        "Decodes come first and take one of the 32 tokens each. The first one to write copies.",
    ),
    12: (
        "60 tokens take four blocks, 64 fill them. Which position is written in step s?",
        "Both need a fifth block in the same step, and one is free. The youngest is preempted.",
        "It waits until the blocks suffice for its text and 16 more tokens of the other request. "
        "Which of its cached blocks does the other request take in the meantime?",
    ),
    13: (
        "Go from hit to hit with the button of the page. A hit is right if the text of the block "
        "is the text of the request.",
        "Click the request with the hit: its table shows its own text, line by line, and the "
        "squares show the text of the blocks.",
        "Then go back: when were these blocks evicted, and what was written into them after that?",
    ),
}  # fmt: skip
