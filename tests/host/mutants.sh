#!/bin/sh
# SPDX-License-Identifier: MIT
# mutants.sh CHECK KERNEL TEXT SEEDS PROBLEM...: leaves out each statement of the kernel's text that waits,
# one at a time. The check must notice, under one of the seeds; a statement that nobody misses is
# either superfluous or untested.
check=$1 kernel=$2 text=$3 seeds=$4
shift 4
killed=0 survived=0 mutant=1
export NATTEN_CACHE_DIR=/dev/null/none
while :; do
    noticed=
    for seed in $seeds; do
        said=$(HOST_MUTANT=$text:$mutant HOST_SEED=$seed "$check" -v -s "$seed" -k "$kernel" "$@" 2>&1) ||
            noticed=$seed
        [ "$noticed" ] && break
    done
    case $said in *"there is no statement $text:$mutant "*) break ;; esac
    if [ "$noticed" ]; then
        killed=$((killed + 1))
    else
        survived=$((survived + 1))
        echo "FAIL nobody misses statement $mutant that waits in the text of $kernel"
    fi
    mutant=$((mutant + 1))
done
[ $mutant -gt 1 ] || echo "FAIL the text of $kernel has nothing that waits" 
echo "mutants of $kernel: $killed passed, $survived failed, 0 skipped"
[ $survived = 0 ] && [ $mutant -gt 1 ]
