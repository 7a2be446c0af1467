"""Three hints for each exercise; `microvllm lab hint N` gives one at a time."""

HINTS = {
    1: (
        "A block of 16 holds the K and V of 16 tokens, and part of a block takes all of it.",
        "Which token's K and V are never computed? The last one is not fed back.",
        "Count prompt + new - 1 tokens, and round up to whole blocks: -(-a // b) rounds up.",
    ),
    2: (
        "The table is in the order of the text: its first entry holds the first tokens.",
        "position // block_size is the place in the table, position % block_size the one inside.",
        "A block begins at slot number * block_size, since block 0 has the first slots.",
    ),
    3: (
        "Read `BlockManager.grow`: it does two things. Which lines note a copy?",
        "Override `grow`. It still has to allocate blocks, or return False if too few are free.",
        "Extend seq.block_table with self.pool.allocate() until it has blocks_for(stop) entries.",
    ),
    4: (
        "After a prompt comes a token that is drawn from logits. Of which token are the logits?",
        "`Sequence.max_cached_tokens` says how many tokens may come from the cache.",
        "64 tokens are four blocks. How long must a prompt be, that four blocks may come from it?",
    ),
    5: (
        "K and V of a token depend on all tokens before it, and this hash does not.",
        "You need a block of equal tokens behind two different beginnings. One may be empty.",
        "First: 16 tokens, then 16 others X, and one more. Second: X, and one more.",
    ),
    6: (
        "Which step needs the most blocks? Look at each step, and add over all that still run.",
        "In step s a request has prompt + s - 1 tokens computed, if it has at least s new ones.",
        "Round each one up to blocks, sum, take the largest sum, and add one for the null block.",
    ),
    7: (
        "`cheapest` of lab/policies.py is not enough. What does the pool gain by each victim?",
        "A block in two tables does not become free. pool.ref_count says in how many it is.",
        "Divide what is lost (num_computed) by the blocks of the table that become free.",
    ),
    8: (
        "The shortest first is good for the mean. A long one then waits for ever: count that in.",
        "A policy has no clock, but scheduler.num_output_tokens only grows. Note what came when.",
        "Take the least of length - waited / k, and try some k between 5 and 30.",
    ),
    9: (
        "Belady, 1966: evict what is needed last. A block's text is pool.hash_of[block].",
        "For each block of pool.cached find the first set in `coming` that has its hash.",
        "A block that is in none of them comes first. Equal ones: the first in pool.cached.",
    ),
    10: (
        "The next token is at position num_computed. Which is the first that it sees?",
        "It sees from num_computed - window on, and those behind it see less.",
        "Only whole blocks before that: max(0, num_computed - window) // size of them.",
    ),
    11: (
        "Write down steps 1 and 2 first. A step computes 32 tokens at most; 40 take two steps.",
        "When its prompt is computed, a sequence forks: two tables, one part-filled block.",
        "Decodes come first and take one token each of the 32. The first one that writes copies.",
    ),
    12: (
        "60 tokens are four blocks, 64 fill them. Which position is written in step s?",
        "Both need a fifth block in one step, and there is one. The default preempts the youngest.",
        "It waits until there is room for it and 16 tokens more of the other. What does the other "
        "take meanwhile, and of which end of the text?",
    ),
    13: (
        "Step from hit to hit, with the button of the page. A hit is right if the block's text is "
        "the request's own.",
        "Click the request that has got the hit: its table has its own text, line by line, "
        "and the squares have the text of the blocks.",
        "Then go back: when were these blocks evicted, and what was written into them since?",
    ),
}  # fmt: skip
