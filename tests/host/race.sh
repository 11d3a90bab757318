#!/bin/sh
# SPDX-License-Identifier: MIT
# race.sh CHECK PROBLEM...: 8 processes plan, compile and run the same kernels with one empty folder of
# compiled kernels.
check=$1
shift
NATTEN_CACHE_DIR=$(mktemp -d)/kernels
export NATTEN_CACHE_DIR
failed=0 children=
for i in 1 2 3 4 5 6 7 8; do
    "$check" -s $i -k cuda-reference "$@" >/dev/null 2>&1 &
    children="$children $!"
done
for child in $children; do
    wait "$child" || failed=$((failed + 1))
done
left=$(find "$NATTEN_CACHE_DIR" -name '.*' -type f | wc -l)
[ "$left" = 0 ] || { echo "FAIL $left unfinished files"; failed=$((failed + 1)); }
rm -rf "$NATTEN_CACHE_DIR"
echo "race of 8 processes: $((8 - failed)) passed, $failed failed, 0 skipped"
[ $failed = 0 ]
