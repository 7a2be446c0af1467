"""Three hints for each exercise; `microvllm learn N --hint` gives one at a time."""

HINTS = {
    1: (
        "Call i of the loop computes a row for each token that the text has at that moment.",
        "The first call has `prompt` rows, the next one `prompt + 1`. How many has the last one?",
        "Sum prompt, prompt + 1, ..., prompt + new - 1.",
    ),
    2: (
        "In each layer, each key and value head has a vector of head_dim numbers for a token.",
        "There are two vectors for each head: one of K, one of V.",
        "Multiply 2, layers, kv_heads, head_dim, tokens and number_bytes.",
    ),
    3: (
        "A batch lasts as long as its longest answer. Which requests belong together?",
        "Sort the requests by their new tokens; prompts matter less, but they matter too.",
        "Sort by (new // 10, prompt), and cut the sorted indices into parts of `size`.",
    ),
    4: (
        "Keep for each slot the call after which it is free.",
        "The next text goes to the slot that is free first.",
        "Start with [0] * slots; add each answer to the smallest entry; the result is the largest.",
    ),
    5: (
        "A list can index a tensor: memory[table] has the blocks in the order of the text.",
        "Its shape is (blocks, block_size, D). The rows of the text need one dimension fewer.",
        "`flatten(0, 1)` joins the first two dimensions; the first `length` rows are the text.",
    ),
    6: (
        "If ref_count of the block is 1, only this table has it: nothing is to be copied.",
        "Else take target = free.pop(). Which two counts change, and which entry of the table?",
        "The old block loses a table, the new one has 1; table[index] = target.",
    ),
    7: (
        "Only full blocks have a hash: there are len(tokens) // block_size of them.",
        "Equal blocks behind different beginnings need different hashes.",
        "Hash a tuple of the previous block's hash and the tokens of this block.",
    ),
    8: (
        "A sequence whose blocks are all shared makes no block free: it is no candidate.",
        "Rows that are found again are not computed again.",
        "Of the sequences with blocks > 0, take the smallest num_computed - findable.",
    ),
    9: (
        "Go through the needs twice: first those that are 1, then the others.",
        "What a text gets is min(need, what is left of the budget).",
        "Start with [0] * len(needs), fill it in both turns, and subtract from the budget.",
    ),
    10: (
        "The K and V of the last token are not computed: a text stores prompt + new - 1 tokens.",
        "Full blocks of the prompt are shared. The part-filled one is copied before it is written.",
        "prompt // block_size shared blocks, and n times the others; if new is 1, all are shared.",
    ),
}
