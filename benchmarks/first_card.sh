#!/usr/bin/env bash
# What does a card say that nobody has seen? Ten minutes on one, in the order that teaches most:
#
#     pip install -e '.[test]' && benchmarks/first_card.sh [--tiny] [PART ...]
#
# Each part is a process with a limit of its own, and its figures are in first_card/PART.json as soon
# as they are there; first_card/report.md is all of them, and what failed. Please send us that file.
# --tiny: does it run? with small models, on a CPU too. OUT: another folder; PYTHON: another python.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-first_card} python=${PYTHON:-python} tiny=
[ "${1:-}" = --tiny ] && tiny=--tiny && shift
wanted=" $* "

part() {  # name, seconds
    [ "$wanted" = "  " ] || [[ "$wanted" = *" $1 "* ]] || return 0
    printf '\n== %s, %s s at most\n' "$1" "$2"
    timeout -k 5 "$2" "$python" benchmarks/first_card.py "$1" "$out" $tiny
    code=$?
    [ $code = 0 ] || echo "== $1 ended with $code"
}

part facts 30        # which card, driver, versions
part tests 150       # the kernels' and the graphs' tests
part graphs 100      # a d12 of the newest era: graphs on and off, greedy, contexts beyond the window
part sync 60         # who makes the host wait? one request for each sampling feature
part headline 200    # a d34: start, one stream, 512 prompts; shares of the limit
part mixed 90        # requests of many lengths
part waits 60        # the same traced: steps for which the device waited for the host
part products 60     # float8 products of 1 to 8,192 rows, with and without fast accumulation
part kernels 60      # the kernels' shares of bandwidth and peak
part profile 60      # five steps under torch's profiler, of 1 and of 512 sequences
"$python" benchmarks/first_card.py report "$out" $tiny
