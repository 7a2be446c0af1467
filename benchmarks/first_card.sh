#!/usr/bin/env bash
# What does a card say that no one has seen? Ten minutes on one, what teaches most first:
#
#     pip install -e '.[test]' && benchmarks/first_card.sh [--tiny] [PART ...]
#
#     facts     which card, how much of it is free, driver, compiler, versions
#     work      a d34 in one process: one stream, 512 prompts, requests of many lengths, shares of the
#               limit; steps for which the device waited for the host; five steps in a profile
#     tests     the kernels' tests, decodes first, and those of the graphs
#     prefixes  256 sequences that share 1,024 tokens: MICROVLLM_SHARED_PREFIXES=1, and without it
#     graphs    a d12 of the newest era: graphs on and off, greedy, contexts beyond the window
#     startup   the first token of a new process, kernels compiled before and not
#     memcheck  a few attention tests under compute-sanitizer
#     sync      who makes the host wait? one request for each sampling feature
#     kernels   the kernels' shares of bandwidth and peak
#     products  float8 products of 1 to 8,192 rows, with and without fast accumulation
#
# Each part has a limit of time, and all have ten minutes. The figures are in first_card/PART.json
# and first_card/report.md as soon as they are there. Please send us that report.
# --tiny: does it run? with small models, on a CPU too. FIRST_CARD_OUT: another folder for the
# report; FIRST_CARD_WORK: for models and kernels, kept for the next run; PYTHON: another python.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${FIRST_CARD_WORK:-${TMPDIR:-/tmp}/microvllm-first-card}
exec "${PYTHON:-python}" benchmarks/first_card.py "${FIRST_CARD_OUT:-first_card}" "$work" "$@"
