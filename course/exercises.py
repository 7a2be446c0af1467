"""The ten exercises, one for each step. Write into a copy: `microvllm learn --start DIR` makes it,
and `microvllm learn N --check` judges it."""


def rows_recomputed(prompt, new):
    """Step 1. How many rows does the naive loop compute for `prompt` tokens and `new` new ones?"""
    raise NotImplementedError


def kv_bytes(layers, kv_heads, head_dim, tokens, number_bytes):
    """Step 2. How many bytes do K and V of `tokens` tokens take, with number_bytes for a number?"""
    raise NotImplementedError


def batches(lengths, size):
    """Step 3. lengths: (prompt tokens, new tokens) of each request, let us say known before. Give
    lists of indices into it, each of at most `size`, so that half as many rows are idle as in the
    order of arrival. A batch with p prompt rows at most and n new tokens at most computes
    len(batch) * (p + n - 1) rows; a request needs prompt + new - 1 of them."""
    raise NotImplementedError


def calls_needed(answers, slots):
    """Step 4. answers: how many decode calls each text takes part in, in the order of arrival.
    `slots` texts run at once, and one that has ended is replaced before the next call. Give the
    number of decode calls until all have ended."""
    raise NotImplementedError


def gather(memory, table, length):
    """Step 5. memory (blocks, block_size, D), a tensor; table: block numbers. Give (length, D), the
    rows of the text in their order, without a loop."""
    raise NotImplementedError


def write(ref_count, free, table, index):
    """Step 6. A text is about to write into the block table[index]. If another table has it, too,
    take a block from the end of the list `free`, and change table and ref_count. Give the pair
    (source, target) that is to be copied, or None if there is nothing to copy."""
    raise NotImplementedError


def hashes(tokens, block_size):
    """Step 7. A hash for each full block: equal for two texts exactly if the texts are equal from
    their beginning to the end of the block."""
    raise NotImplementedError


def victim(running):
    """Step 8. running: for each text (computed, findable, blocks): how many of its tokens are
    computed, how many of these will be found again after it has given its blocks back, and how many
    blocks become free by that (a shared block does not). Give the index of the text to preempt, so
    that a block becomes free, and the fewest rows are computed again."""
    raise NotImplementedError


def shares(needs, budget):
    """Step 9. needs: how many rows each running text needs, the oldest first. Give how many it gets
    in this call: first one row to each that needs just one, as far as the budget goes; then the
    others, the oldest first, get as much as is left."""
    raise NotImplementedError


def blocks_at_end(prompt, new, n, block_size):
    """Step 10. n samples of a prompt, each of `new` tokens, all of them different from the first
    one on. How many blocks do they hold together, just before they end? The last token of a text is
    never an input, so its K and V are not computed."""
    raise NotImplementedError
