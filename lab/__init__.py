"""The lab: small programs that show what a paged KV cache does, to be read and changed.

Each is about a screen long, drives the real BlockManager and Scheduler with a fake model, and needs
no GPU. None imports torch but `windows`, since the blocks of layer groups are a feature of the
engine, and `demo` and the last exercises, which run it. `microvllm lab` lists them, `microvllm lab
fig02` runs one; from the root of a checkout `python -m lab` does the same. A plot goes into
lab-results/NAME.png, its numbers into lab-results/NAME.json. EXERCISES.md has thirteen exercises.

The paper is Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023. Its numbers stand beside ours, and why they differ.
"""
