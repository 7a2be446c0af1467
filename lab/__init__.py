"""The lab: small programs that show how a paged KV cache works. Read and change them.

Most programs drive the real BlockManager and Scheduler with a fake model. They need neither a GPU
nor torch. Only `windows`, `demo` and the last exercises import torch: `windows` uses a feature of
the engine, and the others run the engine. `microvllm lab` lists the programs, and `microvllm lab
fig02` runs one. `python -m lab` does the same in the root of a checkout. Plots are written to
lab-results/NAME.png, their numbers to lab-results/NAME.json. EXERCISES.md has thirteen exercises.

"The paper" is Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023. The programs print its numbers beside ours, and explain differences.
"""
