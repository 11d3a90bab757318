#!/bin/sh
# SPDX-License-Identifier: MIT
# mutants.sh CHECK KERNEL TEXT SEEDS -o OP PROBLEM...: leaves out each statement of the kernel's
# text that waits, one at a time. The check must notice, with one of the problems under one of the
# seeds; a statement that nobody misses is either superfluous or untested.
check=$1 kernel=$2 text=$3 seeds=$4 op=$6
shift 6
killed=0 survived=0 mutant=1
export NATTEN_CACHE_DIR=/dev/null/none

# notice PROBLEM...: whether the check does, as soon as it does; 2: there is no such statement.
notice() {
    for seed in $seeds; do
        for problem; do
            said=$(HOST_MUTANT=$text:$mutant HOST_SEED=$seed \
                "$check" -v -s "$seed" -k "$kernel" -o "$op" "$problem" 2>&1)
            status=$?
            case $said in *"there is no statement $text:$mutant "*) return 2 ;; esac
            [ $status = 0 ] || return 0
        done
    done
    return 1
}

while :; do
    notice "$@"
    case $? in
    0) killed=$((killed + 1)) ;;
    1)
        survived=$((survived + 1))
        echo "FAIL nobody misses statement $mutant that waits in the text of $kernel"
        ;;
    2) break ;;
    esac
    mutant=$((mutant + 1))
done
[ $mutant -gt 1 ] || echo "FAIL the text of $kernel has nothing that waits"
echo "mutants of $kernel: $killed passed, $survived failed, 0 skipped"
[ $survived = 0 ] && [ $mutant -gt 1 ]
