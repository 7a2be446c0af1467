#!/usr/bin/env bash
# The first tests and measurements on a GPU, in ten minutes, the most informative first:
#
#     pip install -e '.[test]' && benchmarks/first_card.sh [--tiny] [PART ...]
#
#     facts     the card, its free memory, driver, compiler, versions
#     work      the throughput of a d34 and its share of the limit: one stream, 512 prompts, requests
#               of many lengths; steps in which the device waited for the host; a profile of five steps
#     tests     the tests of the kernels (decodes first) and of the CUDA graphs
#     prefixes  256 sequences that share 1,024 tokens, with MICROVLLM_SHARED_PREFIXES=1 and without
#     graphs    a d12 of the newest era: graphs on and off, greedy, contexts longer than the window
#     startup   the first token of a new process, with and without compiled kernels
#     memcheck  a few attention tests under compute-sanitizer
#     sync      the sampling features that make the host wait for the device
#     kernels   the share of the bandwidth that the kernels for decodes and for few rows reach
#     products  matrix products of 1 to 4,096 rows: bfloat16, and float8 with and without fast
#               accumulation
#
# Each part has a time limit, and all parts together take at most ten minutes. The results are
# written to first_card/PART.json and first_card/report.md as soon as they are known. Please send us
# the report. --tiny only tests that the parts run: it uses small models and works on a CPU.
# Environment variables: FIRST_CARD_OUT, another folder for the report; FIRST_CARD_WORK, a folder for
# models and kernels, which are kept for the next run; PYTHON, another interpreter.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${FIRST_CARD_WORK:-${TMPDIR:-/tmp}/microvllm-first-card}
exec "${PYTHON:-python}" benchmarks/first_card.py "${FIRST_CARD_OUT:-first_card}" "$work" "$@"
