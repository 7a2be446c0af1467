"""The ten exercises, one for each step. Write into a copy: `microvllm learn --start DIR` makes it,
and `microvllm learn N --check` checks your solution of exercise N."""


def rows_recomputed(prompt, new):
    """Step 1. How many rows does the naive loop compute for `prompt` tokens and `new` new ones?"""
    raise NotImplementedError


def kv_bytes(layers, kv_heads, head_dim, tokens, number_bytes):
    """Step 2. How many bytes do K and V of `tokens` tokens take, with number_bytes per number?"""
    raise NotImplementedError


def batches(lengths, size):
    """Step 3. lengths: (prompt tokens, new tokens) of each request; assume that they are known in
    advance. Return batches: lists of at most `size` indices into `lengths`. They must have at most
    half as many idle rows as batches in the order of arrival. If the longest prompt of a batch has
    p tokens and the longest answer n, the batch computes len(batch) * (p + n - 1) rows. A request
    needs prompt + new - 1 of them."""
    raise NotImplementedError


def calls_needed(answers, slots):
    """Step 4. answers: the number of decode calls that each text needs, in the order of arrival.
    `slots` texts run at once, and a text that has ended is replaced before the next call. Return
    the number of decode calls until all have ended."""
    raise NotImplementedError


def gather(memory, table, length):
    """Step 5. memory: a tensor (blocks, block_size, D); table: block numbers. Return the rows of
    the text in order, a tensor (length, D), without a loop."""
    raise NotImplementedError


def write(ref_count, free, table, index):
    """Step 6. A text is about to write into the block table[index]. If another table also contains
    this block, take a block from the end of the list `free`, and change table and ref_count. Return
    the pair (source, target) to copy, or None if there is nothing to copy."""
    raise NotImplementedError


def hashes(tokens, block_size):
    """Step 7. Return one hash for each full block. The hashes of two blocks are equal exactly if
    their texts are equal from the beginning to the end of the block."""
    raise NotImplementedError


def victim(running):
    """Step 8. running: (computed, findable, blocks) for each text. computed: its computed tokens.
    findable: how many of these the prefix cache finds again after a preemption. blocks: how many
    blocks become free by its preemption (a shared block does not). Return the index of the text to
    preempt, so that a block becomes free and the fewest rows are computed again."""
    raise NotImplementedError


def shares(needs, budget):
    """Step 9. needs: the number of rows that each running text needs, the oldest text first. Return
    the number of rows for each text in this call. First, each text that needs one row gets it, as
    far as the budget allows. Then the other texts, the oldest first, share the rest."""
    raise NotImplementedError


def blocks_at_end(prompt, new, n, block_size):
    """Step 10. n samples of a prompt, each of `new` tokens. The samples differ from their first
    token on. How many blocks do they use in total, just before they end? The last token of a text
    is never an input, so its K and V are not computed."""
    raise NotImplementedError
