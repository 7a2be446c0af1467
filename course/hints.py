"""Three hints for each exercise; `microvllm learn N --hint` shows one at a time."""

HINTS = {
    1: (
        "Each call of the loop computes one row for each token that the text has by then.",
        "The first call has `prompt` rows, the next `prompt + 1`. How many has the last call?",
        "Sum prompt, prompt + 1, ..., prompt + new - 1.",
    ),
    2: (
        "For each token, each head of each layer stores vectors of head_dim numbers.",
        "There are two vectors for each head: one of K, one of V.",
        "Multiply 2, layers, kv_heads, head_dim, tokens and number_bytes.",
    ),
    3: (
        "A batch lasts as long as its longest answer. Which requests belong together?",
        "Sort the requests by their new tokens. The prompts matter less, but they matter too.",
        "Sort by (new // 10, prompt), and split the sorted indices into parts of `size`.",
    ),
    4: (
        "For each slot, keep the number of the call after which it is free.",
        "The next text goes to the slot that becomes free first.",
        "Start with [0] * slots; add each answer to the smallest entry; the result is the largest.",
    ),
    5: (
        "A list can index a tensor: memory[table] has the blocks in the order of the text.",
        "Its shape is (blocks, block_size, D). The rows of the text have one dimension fewer.",
        "`flatten(0, 1)` joins the first two dimensions. The first `length` rows are the text.",
    ),
    6: (
        "If ref_count of the block is 1, only this table has it, and there is nothing to copy.",
        "Else take target = free.pop(). Which two counts change, and which entry of the table?",
        "The count of the old block falls by 1, the count of the new one is 1; "
        "table[index] = target.",
    ),
    7: (
        "Only full blocks have a hash: there are len(tokens) // block_size of them.",
        "Equal blocks after different prefixes need different hashes.",
        "Hash a tuple of the previous block's hash and the tokens of this block.",
    ),
    8: (
        "If all blocks of a text are shared, its preemption frees no block: skip this text.",
        "Rows that are found again are not computed again.",
        "Among the texts with blocks > 0, take the one with the smallest computed - findable.",
    ),
    9: (
        "Iterate over the needs twice: first those that are 1, then the others.",
        "A text gets min(need, rest of the budget).",
        "Start with [0] * len(needs), fill it in both passes, and subtract from the budget.",
    ),
    10: (
        "The K and V of the last token are not computed: a text stores prompt + new - 1 tokens.",
        "Full blocks of the prompt are shared. The part-filled one is copied before a write.",
        "prompt // block_size blocks are shared, the others count n times; if new is 1, all are "
        "shared.",
    ),
}
